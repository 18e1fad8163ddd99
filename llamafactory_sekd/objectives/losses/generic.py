"""Any objective of the formula, for a block of tokens: one loss and one gradient for every divergence.

For a divergence that is elementwise in (target, student) the derivative with respect to the student's logits is

    q (u - Σ q u)     with u = ∂D/∂q, elementwise

A divergence therefore returns its sum and its pull `s ∂D/∂s`, where `s` is the student or its proxy
`s = α q + (1-α) t`; then `q u = (α q / s) s ∂D/∂s`. The pull, not the derivative, because it stays finite where `s`
underflows.
"""

from __future__ import annotations

import torch

from llamafactory_sekd.formula import Side
from llamafactory_sekd.objectives.compiling import may_look, row_sums
from llamafactory_sekd.objectives.losses.closed_forms import INFINITE, Block, add_at_labels
from llamafactory_sekd.objectives.losses.elementwise import DIVERGENCES, Pair, user_divergence


def formula(block: Block) -> torch.Tensor:
    """Return the loss of every token, and write its gradient to `block.gradient` where one is wanted."""
    settings = block.settings
    assert settings.formula is not None
    easy, hard, gate = settings.formula.easy, settings.formula.hard, settings.formula.gate
    if hard is None or gate is None:
        loss, gradient = _side(_Tokens(block), easy)
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
            return _side(_Tokens(block), side)
    loss = torch.zeros_like(block.difficulty)
    gradient = None
    # A new tensor, since `block.gradient` is the memory of the logits that the other side still reads. A side without
    # weight does not write to it.
    if block.wants_gradient:
        gradient = torch.zeros_like(block.p) if 0.0 in (easy.weight, hard.weight) else torch.empty_like(block.p)
    for side, rows in parts:
        if side.weight == 0.0:
            continue
        part, slope = _side(_Tokens(block, rows), side)
        loss[rows] = part
        if gradient is not None and slope is not None:
            gradient.index_copy_(0, rows, slope)
    return loss, gradient


def _choose(easy: _Result, hard: _Result, is_hard: torch.Tensor) -> _Result:
    loss = torch.where(is_hard, hard[0], easy[0])
    if easy[1] is None or hard[1] is None:
        return loss, None
    return loss, torch.where(is_hard.unsqueeze(-1), hard[1], easy[1])


def _blend(easy: _Result, hard: _Result, degree: torch.Tensor) -> _Result:
    # A weight of zero switches a loss off even where it is infinite.
    loss = _weighted(1.0 - degree, easy[0]) + _weighted(degree, hard[0])
    if easy[1] is None or hard[1] is None:
        return loss, None
    return loss, torch.lerp(easy[1], hard[1], degree.unsqueeze(-1))


def _weighted(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.where(weight > 0, weight * value, 0.0)


class _Tokens:
    """Some of a block's tokens, gathered when they are asked for.

    Args:
        block: all of them.
        rows: int64 `[some]`, None for all.
    """

    def __init__(self, block: Block, rows: torch.Tensor | None = None) -> None:
        assert block.logits is not None
        self.block, self.rows, self.source = block, rows, block.logits
        self.target = block.settings.formula.target if block.settings.formula is not None else ""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows of these tokens."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)

    @property
    def labels(self) -> torch.Tensor:
        """The ground truth, `[some, 1]`."""
        return self.of(self.block.labels)

    def pair(self, side: Side) -> Pair:
        """Return target and student of a side."""
        # There the losses are mixed, not the distributions: the target is the teacher alone.
        kd_lambda = 1.0 if self.target == "teacher" else side.kd_lambda
        block, source = self.block, self.source
        if side.temperature == block.settings.kd_temperature:
            p, q, z, w = (self.of(matrix) for matrix in (block.p, block.q, source.z, source.w))
            z_norm, w_norm, kl = self.of(source.z_norm), self.of(source.w_norm), self.of(block.kl)
        else:
            # The block's own p and q are at the easy side's temperature.
            assert source.untempered is not None
            z, w = (self.of(matrix) / side.temperature for matrix in source.untempered)
            z_norm, w_norm, kl = z.logsumexp(-1), w.logsumexp(-1), None
            p, q = (w - w_norm.unsqueeze(-1)).exp_(), (z - z_norm.unsqueeze(-1)).exp_()
        return Pair(p, q, z, w, z_norm, w_norm, self.labels, kl, kd_lambda=kd_lambda, skew=side.skew)


def _side(tokens: _Tokens, side: Side) -> _Result:
    """Return losses and gradients of some tokens as one side of the gate has them."""
    block = tokens.block
    # A token that is spared must not cost anything, nor bring in an infinite divergence as zero times infinity.
    if side.weight == 0.0:
        loss = torch.zeros_like(tokens.of(block.difficulty))
        return loss, torch.zeros_like(tokens.of(block.p)) if block.wants_gradient else None
    pair = tokens.pair(side)
    temperature, weight, share = side.temperature, side.weight, side.kd_lambda
    mixes_losses = tokens.target == "teacher"
    loss = tokens.of(block.ce)
    gradient = None
    if share > 0.0 or not mixes_losses:
        value, pull = _sum_of_divergences(pair, side, block.wants_gradient)
        factor = share if mixes_losses else 1.0
        value = factor * temperature**2 * value
        # A weight of zero switches its term off even where the term is infinite.
        loss = value if share >= 1.0 or not mixes_losses else value + (1.0 - share) * loss
        if pull is not None:
            gradient = _to_logits(pair, pull)
            scale = factor * weight * temperature * pair.skew
            if scale != 1.0:
                gradient.mul_(scale)
    if mixes_losses and share < 1.0 and block.wants_gradient:
        plain_q = tokens.of(block.plain_q)
        if gradient is None:
            gradient = plain_q * (weight * (1.0 - share))
        else:
            gradient.add_(plain_q, alpha=weight * (1.0 - share))
        add_at_labels(gradient, tokens.labels, -weight * (1.0 - share))
    return loss * weight if weight != 1.0 else loss, gradient


def _sum_of_divergences(pair: Pair, side: Side, wants_gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    value, pull = None, None
    for name, factor in side.divergences:
        if factor == 0.0 and len(side.divergences) > 1:  # zero times infinity
            continue
        if name in DIVERGENCES:
            amount, own_pull = DIVERGENCES[name](pair, side, wants_gradient)
        else:
            amount, own_pull = user_divergence(name, pair, wants_gradient)
        amount = amount.masked_fill(amount > INFINITE, torch.inf)
        if factor != 1.0:
            amount = amount * factor
        value = amount if value is None else value + amount
        if own_pull is not None:
            own_pull = own_pull if factor == 1.0 else own_pull * factor
            pull = own_pull if pull is None else pull + own_pull
    assert value is not None
    return value, pull


def _to_logits(pair: Pair, pull: torch.Tensor) -> torch.Tensor:
    """`q (u - Σ q u) / α` from `s ∂D/∂s`; the pull is used up."""
    if pair.skew < 1.0:
        pull = (pair.q / pair.clamped_s).mul_(pull)
    # In place and at once: two passes with a new tensor take six times as long.
    return pull.addcmul_(pair.q, row_sums(pull).unsqueeze(-1), value=-1.0)
