"""Any objective of the formula, for a block of tokens: one loss and one gradient for every divergence.

For a divergence that is elementwise in (target, student) the derivative with respect to the student's logits is

    q (u - Σ q u)     with u = ∂D/∂q, elementwise

A divergence therefore returns its sum and its pull `s ∂D/∂s`, where `s` is the student or its proxy
`s = α q + (1-α) t`; then `q u = (α q / s) s ∂D/∂s`. The pull, not the derivative, because it stays finite where `s`
underflows.
"""

from __future__ import annotations

from typing import Any

import torch

from llamafactory_sekd.formula import Side
from llamafactory_sekd.objectives.compiling import may_look, row_sums, softmax_and_norm
from llamafactory_sekd.objectives.losses.closed_forms import INFINITE, Block, add_at_labels
from llamafactory_sekd.objectives.losses.elementwise import DIVERGENCES, Pair, Term, times
from llamafactory_sekd.objectives.losses.users_divergence import user_divergence


def formula(block: Block) -> torch.Tensor:
    """Return the loss of every token, and write its gradient to `block.gradient` where one is wanted."""
    settings = block.settings
    assert settings.formula is not None
    easy, hard, gate = settings.formula.easy, settings.formula.hard, settings.formula.gate
    if hard is None or gate is None or (hard == easy and gate.width == 0.0):
        loss, gradient = _side(_Tokens(block), easy, block.gradient)
    elif gate.width != 0.0:
        assert block.signal is not None
        # A gate with a width has no easy and hard tokens to sort by: both sides, of all tokens.
        degree = torch.sigmoid((gate.sign * block.signal - settings.kd_gamma) / gate.width)
        loss, gradient = _blend(_side(_Tokens(block), easy), _side(_Tokens(block), hard), degree)
        block.hard = degree
    elif not may_look(block.hard.device):
        # Sorting would wait for the accelerator: see `_self_evolution`.
        loss, gradient = _choose(_side(_Tokens(block), easy), _side(_Tokens(block), hard), block.hard)
    else:
        loss, gradient = _on_rows(block, easy, hard)
    if gradient is not None:
        block.gradient = gradient
    return loss


_Result = tuple[torch.Tensor, torch.Tensor | None]


def _on_rows(block: Block, easy: Side, hard: Side) -> _Result:
    parts = [(easy, (~block.hard).nonzero().squeeze(-1)), (hard, block.hard.nonzero().squeeze(-1))]
    for side, rows in parts:
        # All on one side: nothing to gather and to put back.
        if len(rows) == len(block.hard):
            return _side(_Tokens(block), side, block.gradient)
    loss = torch.zeros_like(block.difficulty)
    for side, rows in parts:
        loss[rows], slope = _side(_Tokens(block, rows), side)
        # Over the logits of these tokens; those of the other side are still there for it to read.
        if slope is not None:
            block.gradient.index_copy_(0, rows, slope)
    return loss, block.gradient if block.wants_gradient else None


def _choose(easy: _Result, hard: _Result, is_hard: torch.Tensor) -> _Result:
    loss = torch.where(is_hard, hard[0], easy[0])
    if easy[1] is None or hard[1] is None:
        return loss, None
    return loss, torch.where(is_hard.unsqueeze(-1), hard[1], easy[1])


def _blend(easy: _Result, hard: _Result, degree: torch.Tensor) -> _Result:
    loss = times(1.0 - degree, easy[0]) + times(degree, hard[0])
    if easy[1] is None or hard[1] is None:
        return loss, None
    return loss, torch.lerp(easy[1], hard[1], degree.unsqueeze(-1))


class _Tokens:
    """Some of a block's tokens, gathered when they are asked for.

    Args:
        block: all of them.
        rows: int64 `[some]`, None for all.
    """

    def __init__(self, block: Block, rows: torch.Tensor | None = None) -> None:
        assert block.logits is not None
        assert block.settings.formula is not None
        self.block, self.rows, self.source = block, rows, block.logits
        self.formula = block.settings.formula

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows of these tokens."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)

    @property
    def labels(self) -> torch.Tensor:
        """The ground truth, `[some, 1]`."""
        return self.of(self.block.labels)

    def temperature(self, side: Side) -> Any:
        """Return T, a number or, where the gate cools, one for each token, `[some]`, without a gradient."""
        gate, threshold = self.formula.gate, self.block.settings.kd_gamma
        if gate is None or gate.cooling == 0.0:
            return side.temperature
        assert self.block.signal is not None
        threshold = gate.sign * threshold
        if isinstance(threshold, torch.Tensor):  # a running mean, of signals that may all have been 0
            threshold = threshold.clamp_min(torch.finfo(self.block.signal.dtype).tiny)
        distance = torch.tanh(torch.log(self.of(self.block.signal) / threshold))
        return side.temperature * torch.exp(-gate.sign * gate.cooling * distance)

    def pair(self, side: Side, temperature: Any) -> Pair:
        """Return target and student of a side at its temperature, a number or `[some]`."""
        # There the losses are mixed, not the distributions: the target is the teacher alone.
        kd_lambda = 1.0 if self.formula.target == "teacher" else side.kd_lambda
        block, source, of = self.block, self.source, self.of
        kl: torch.Tensor | None = None
        if self.formula.is_measured(side):
            p, q, z, w, ratio, kl = block.p, block.q, source.z, source.w, block.log_ratio, self.of(block.kl)
            z_norm, w_norm, shift = (norm.unsqueeze(-1) for norm in (source.z_norm, source.w_norm, block.shift))
            ce = of(z_norm - z.gather(-1, block.labels))
        else:
            assert source.untempered is not None
            z, w = (of(matrix) for matrix in source.untempered)
            w = w if side.interpolation >= 1.0 else torch.lerp(z, w, side.interpolation)
            divisor = temperature.unsqueeze(-1) if isinstance(temperature, torch.Tensor) else temperature
            z, w = z / divisor, w / divisor
            p, q, ratio = torch.empty_like(w), torch.empty_like(z), w - z
            z_norm, w_norm = (
                softmax_and_norm(logits, logits.amax(-1), out, exact=True).unsqueeze(-1)
                for logits, out in ((z, q), (w, p))
            )
            shift = z_norm - w_norm
            ce = z_norm - z.gather(-1, self.labels)
            of = _as_they_are
        return Pair(
            of(p),
            of(q),
            lambda plus: of(w) - (of(w_norm) - plus),
            lambda plus: of(z) - (of(z_norm) - plus),
            lambda plus: of(ratio) + (of(shift) + plus),
            self.labels,
            ce.squeeze(-1),
            kl,
            kd_lambda=kd_lambda,
            skew=side.skew,
        )


def _as_they_are(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _side(tokens: _Tokens, side: Side, out: torch.Tensor | None = None) -> _Result:
    """Return losses and gradients of some tokens as one side of the gate has them.

    Args:
        tokens: which they are.
        side: what they lose.
        out: where the gradient goes; it may be the memory of the logits. None for a new matrix.
    """
    block = tokens.block
    # A token that is spared must not cost anything, nor bring in an infinite divergence as zero times infinity.
    if side.weight == 0.0:
        loss = torch.zeros_like(tokens.of(block.difficulty))
        if not block.wants_gradient:
            return loss, None
        return loss, loss.new_zeros(()).expand(len(loss), block.p.shape[-1]) if out is None else out.zero_()
    temperature, weight, share = tokens.temperature(side), side.weight, side.kd_lambda
    pair = tokens.pair(side, temperature)
    mixes_losses = tokens.formula.target == "teacher"
    loss, term = tokens.of(block.ce), None
    factor = share if mixes_losses else 1.0
    if factor > 0.0:
        term = _sum_of_divergences(pair, side, block.wants_gradient)
        value = factor * temperature**2 * term.value
        # A weight of zero switches its term off even where the term is infinite.
        loss = value if share >= 1.0 or not mixes_losses else value + (1.0 - share) * loss
    loss = loss * weight if weight != 1.0 else loss
    if not block.wants_gradient:
        return loss, None
    out = torch.empty_like(pair.q) if out is None else out
    truth = weight * (1.0 - share) if mixes_losses else 0.0
    # In the end one pass for q and one for the pull, at most three, whatever the keys are.
    # At T = 1 the cross-entropy's share of q joins that of the divergence, which spares a pass.
    joined = side.temperature == 1.0 and tokens.formula.is_measured(side)
    if term is not None and term.pull is not None:
        scale = factor * weight * temperature * pair.skew * term.factor
        _to_logits(pair, term.pull, scale, truth if joined else 0.0, out)
        if truth != 0.0 and not joined:
            out.add_(tokens.of(block.plain_q), alpha=truth)
    else:
        torch.mul(tokens.of(block.plain_q), truth, out=out)
    return loss, add_at_labels(out, tokens.labels, -truth) if truth != 0.0 else out


def _sum_of_divergences(pair: Pair, side: Side, wants_gradient: bool) -> Term:
    value, pull, factor = None, None, 1.0
    for name, own_factor in side.divergences:
        if own_factor == 0.0 and len(side.divergences) > 1:  # zero times infinity
            continue
        divergence = DIVERGENCES.get(name)
        if divergence is None:
            term = user_divergence(name, pair, wants_gradient)
        else:
            term = divergence(pair, side, wants_gradient)
        amount = term.value.masked_fill(term.value > INFINITE, torch.inf)
        amount = amount * own_factor if own_factor != 1.0 else amount
        own_factor = own_factor * term.factor
        if value is None:
            value, pull, factor = amount, term.pull, own_factor
            continue
        value = value + amount
        if pull is not None and term.pull is not None:
            # A first pull may be a matrix that the next divergence reads.
            pull, factor = (pull * factor).add_(term.pull, alpha=own_factor), 1.0
    assert value is not None
    return Term(value, pull, factor)


def _to_logits(pair: Pair, pull: torch.Tensor, scale: Any, share: float, out: torch.Tensor) -> None:
    """Write `scale · q (u - Σ q u) / α + share · q` to `out`; the pull is `s ∂D/∂s`, the scale may be `[rows]`."""
    if pair.skew < 1.0:
        pull = (pair.q / pair.clamped_s).mul_(pull)
    # Two passes in all, whatever the scale and the share; a pass that makes a new tensor takes several times as long.
    torch.mul(pair.q, (share - scale * row_sums(pull)).unsqueeze(-1), out=out)
    if isinstance(scale, torch.Tensor):
        out.addcmul_(pull, scale.unsqueeze(-1))
    else:
        out.add_(pull, alpha=scale)
