"""The objectives once more, with their gradients in closed form, for a block of tokens whose logits are at hand.

With `p`, `q` and `y~` as in the paper, the derivatives with respect to the student's logits `z` are as follows (at a
temperature T the chain rule turns the factor T² of a KL term into T):

    -log q_y              q - y
    KL(t ‖ q)             q - t
    KL(t ‖ β q + (1-β) t)  q Σr - r     with r = β t q / (β q + (1-β) t) elementwise
    KL(q ‖ p)             q (log q - log p - KL(q ‖ p))

Each function reads a `Block`, writes the gradient into `block.gradient` where one is wanted, and returns the loss of
every token. They work in place on the block's buffers: a pass over memory costs more than the arithmetic in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llamafactory_sekd.objectives.compiling import may_look, row_sums
from llamafactory_sekd.objectives.objective_settings import Settings


# Infinite differences of logits are replaced by HUGE, so that zero times it is zero; a divergence beyond INFINITE then
# tells that one of them had a weight.
HUGE = 1e30
INFINITE = 1e20


@dataclass(frozen=True, slots=True)
class Logits:
    """What a formula needs beyond probabilities: logarithms that do not underflow. Matrices are `[rows, vocab]`.

    Attributes:
        z, w: logits of student and teacher at temperature T.
        z_norm, w_norm: their `log Σ exp`, `[rows]`.
        untempered: z and w at T = 1 where the two sides of a gate have temperatures of their own, else None.
    """

    z: torch.Tensor
    w: torch.Tensor
    z_norm: torch.Tensor
    w_norm: torch.Tensor
    untempered: tuple[torch.Tensor, torch.Tensor] | None


@dataclass(slots=True)
class Block:
    """Some tokens on their way from logits to gradients. Matrices are `[rows, vocab]`, in float32 or float64.

    Attributes:
        p, q: teacher and student at temperature T; an objective may overwrite them.
        plain_q: the student at T = 1; `q` itself where that is T.
        log_ratio: `log p - log q` at T but for `shift`, `[rows]`, which is still to be added; may be overwritten.
        gradient: receives `dL/dz` of every token.
        spare: a buffer without content.
        labels: `[rows, 1]`.
        difficulty, kl: `KL(y~ ‖ q)` and `KL(p ‖ q)` at T, `[rows]`.
        ce, teacher_kl, teacher_ce, agreement: see `TokenStatistics`, `[rows]`.
        hard: bool `[rows]`.
        wants_gradient: False in evaluation, where only the loss is needed.
        easy_norm, hard_norm: see `TokenStatistics`; filled in where the loss of the hard tokens has a factor.
        signal, logits: for a formula, see `TokenStatistics` and `Logits`; `gradient` and `logits.z` share memory.
    """

    settings: Settings
    wants_gradient: bool
    labels: torch.Tensor
    p: torch.Tensor
    q: torch.Tensor
    plain_q: torch.Tensor
    log_ratio: torch.Tensor
    shift: torch.Tensor
    gradient: torch.Tensor
    spare: torch.Tensor
    difficulty: torch.Tensor
    kl: torch.Tensor
    ce: torch.Tensor
    teacher_kl: torch.Tensor
    teacher_ce: torch.Tensor
    agreement: torch.Tensor
    hard: torch.Tensor
    easy_norm: torch.Tensor | None = None
    hard_norm: torch.Tensor | None = None
    signal: torch.Tensor | None = None
    logits: Logits | None = None


def difficulty(kl: torch.Tensor, ce: torch.Tensor, p_label: torch.Tensor, kd_lambda: float) -> torch.Tensor:
    """Equation 5 from quantities that are there already.

    `y~` differs from `λ p` in one entry, so with `t = (1-λ) + λ p_y` the target's probability of the ground truth
    `KL(y~ ‖ q) = λ KL(p ‖ q) + (1-λ) (-log q_y) + λ log λ (1 - p_y) - λ p_y log p_y + t log t`.
    """
    # No pass over the vocabulary: with these terms the difficulty is known before any target is formed.
    # The ends have no logarithm of λ or 1-λ; their weights are zero, and zero times -inf is NaN.
    if kd_lambda <= 0.0:
        return ce
    if kd_lambda >= 1.0:
        return kl
    target_label = (1.0 - kd_lambda) + kd_lambda * p_label
    mixing = kd_lambda * (math.log(kd_lambda) * (1.0 - p_label) - torch.xlogy(p_label, p_label))
    return kd_lambda * kl + (1.0 - kd_lambda) * ce + mixing + torch.xlogy(target_label, target_label)


def no_evolution(block: Block) -> torch.Tensor:
    """Equation 8."""
    temperature = block.settings.kd_temperature
    if block.wants_gradient:
        _easy_gradient(block)
        _scale(block.gradient, temperature)
    return temperature**2 * block.difficulty


def skew(block: Block) -> torch.Tensor:
    """Equation 7."""
    temperature = block.settings.kd_temperature
    if block.settings.kd_beta >= 1.0:
        # With β = 1 the proxy is the student itself (identity 2), and the easy form has no ratio q/t to form.
        return no_evolution(block)
    loss = _skewed(block, block.q, _mixed_target(block.p, block.labels, block.settings.kd_lambda), block.gradient)
    if block.wants_gradient:
        _scale(block.gradient, temperature)
    return temperature**2 * loss


def self_evolution(block: Block) -> torch.Tensor:
    """Equation 7 for hard tokens, times `kd_hard_scale` where there is one, and equation 8 for easy tokens."""
    scale = block.settings.kd_hard_scale
    if scale is None:
        return _self_evolution(block)
    if block.wants_gradient:
        _easy_gradient(block)
        # Before the loss overwrites the buffer: what the easy loss would give to the hard tokens.
        block.easy_norm = _norm_of_hard(block)
    loss = _self_evolution(block)
    factor = torch.ones_like(loss).masked_fill_(block.hard, scale)
    if block.wants_gradient:
        block.hard_norm = _norm_of_hard(block) / block.settings.kd_temperature
        block.gradient.mul_(factor.unsqueeze(-1))
    return loss * factor


def _norm_of_hard(block: Block) -> torch.Tensor:
    return torch.linalg.vector_norm(block.gradient, dim=-1).masked_fill_(~block.hard, 0.0)


def _self_evolution(block: Block) -> torch.Tensor:
    if block.settings.kd_beta >= 1.0:
        return no_evolution(block)
    # To count the hard tokens the CPU would wait for the accelerator, in every block. There both losses
    # are formed for all tokens; where a look is free, only the hard rows pay for the second one.
    if not may_look(block.hard.device):
        return _self_evolution_everywhere(block)
    rows = block.hard.nonzero().squeeze(-1)
    if len(rows) == 0:
        return no_evolution(block)
    if len(rows) == len(block.hard):
        return skew(block)
    return _self_evolution_on_rows(block, rows)


def skew_teacher(block: Block) -> torch.Tensor:
    """Equation 10."""
    settings = block.settings
    if settings.kd_beta >= 1.0:
        return forward_kl(block)
    # A teacher's zero is lifted like the mixed target's, for the same reason: see `_skewed`.
    divergence = _skewed(block, block.q, block.p.clamp_min_(torch.finfo(block.p.dtype).tiny), block.gradient)
    if block.wants_gradient:
        _scale(block.gradient, settings.kd_lambda * settings.kd_temperature)
        _add_cross_entropy_gradient(block)
    return _with_cross_entropy(block, divergence)


def forward_kl(block: Block) -> torch.Tensor:
    """Equation 3."""
    settings = block.settings
    # Two passes at T = 1 in place of four: λ (q - p) + (1-λ) (q - y) is q - y~.
    if block.wants_gradient and settings.kd_temperature == 1.0:
        _easy_gradient(block)  # identity 1: the same gradient
    elif block.wants_gradient:
        torch.sub(block.q, block.p, out=block.gradient)
        _scale(block.gradient, settings.kd_lambda * settings.kd_temperature)
        _add_cross_entropy_gradient(block)
    return _with_cross_entropy(block, block.kl)


def reverse_kl(block: Block) -> torch.Tensor:
    """`(1-λ) (-log q_y) + λ T² KL(q ‖ p)`."""
    settings = block.settings
    # log p - log q in place; its mean under q is -KL(q ‖ p), so one sign at the end serves loss and gradient.
    log_ratio = block.log_ratio.add_(block.shift.unsqueeze(-1))
    divergence = -row_sums(torch.mul(block.q, log_ratio, out=block.spare))
    if block.wants_gradient:
        log_ratio.add_(divergence.unsqueeze(-1))
        torch.mul(block.q, log_ratio, out=block.gradient)
        _scale(block.gradient, -settings.kd_lambda * settings.kd_temperature)
        _add_cross_entropy_gradient(block)
    return _with_cross_entropy(block, divergence.masked_fill(divergence > INFINITE, torch.inf))


def _self_evolution_on_rows(block: Block, rows: torch.Tensor) -> torch.Tensor:
    settings, number = block.settings, len(rows)
    hard_q = torch.index_select(block.q, 0, rows, out=block.spare[:number])
    hard_p = torch.index_select(block.p, 0, rows, out=block.log_ratio[:number])
    if block.wants_gradient:
        _easy_gradient(block)
    target = _mixed_target(hard_p, block.labels[rows], settings.kd_lambda)
    # The hard rows were copied out, and with the easy gradient nobody reads q and p any more: no buffer is added.
    gradient = block.q[:number]
    loss = _skewed(block, hard_q, target, gradient, scratch=block.p[:number])
    if block.wants_gradient:
        block.gradient.index_copy_(0, rows, gradient)
        _scale(block.gradient, settings.kd_temperature)
    return settings.kd_temperature**2 * block.difficulty.index_copy(0, rows, loss)


def _self_evolution_everywhere(block: Block) -> torch.Tensor:
    settings, hard = block.settings, block.hard
    if block.wants_gradient:
        _easy_gradient(block)
    target = _mixed_target(block.p, block.labels, settings.kd_lambda)
    loss = _skewed(block, block.q, target, block.spare)
    if block.wants_gradient:
        torch.where(hard.unsqueeze(-1), block.spare, block.gradient, out=block.gradient)
        _scale(block.gradient, settings.kd_temperature)
    return settings.kd_temperature**2 * torch.where(hard, loss, block.difficulty)


def _mixed_target(p: torch.Tensor, labels: torch.Tensor, kd_lambda: float) -> torch.Tensor:
    """Equation 4, in place, but for the smallest normal number: see `_skewed`."""
    torch.add(p.new_full((), torch.finfo(p.dtype).tiny), p, alpha=kd_lambda, out=p)
    return add_at_labels(p, labels, 1.0 - kd_lambda)


def _skewed(
    block: Block,
    q: torch.Tensor,
    target: torch.Tensor,
    gradient: torch.Tensor,
    scratch: torch.Tensor | None = None,
) -> torch.Tensor:
    """`KL(t ‖ β q + (1-β) t)` for β < 1 through `g = (1-β) + β q/t`: the sum of `-t log g`, and `r = t·(β q/t)/g`.

    The target must not be zero anywhere: with the smallest normal number in its place, q/t is finite and its weight
    still vanishes.
    """
    beta = block.settings.kd_beta
    # As a ratio and not as log(β q + (1-β) t) - log t: one logarithm less, and no cancellation where q is close to t.
    g = block.log_ratio if scratch is None else scratch
    torch.addcdiv(target.new_full((), 1.0 - beta), q, target, value=beta, out=g)
    # The gradient's buffer serves the logarithms first: the loss is summed up before the gradient is written.
    torch.log(g, out=gradient)
    loss = -row_sums(gradient.mul_(target))
    if block.wants_gradient:
        torch.div(q, g, out=g)
        torch.mul(q, beta * row_sums(g).unsqueeze(-1), out=gradient)
        gradient.sub_(g, alpha=beta)
    return loss


def _easy_gradient(block: Block) -> None:
    """`q - y~`, without forming the target."""
    # The target differs from λ p in one entry of each row, which is added afterwards.
    kd_lambda = block.settings.kd_lambda
    torch.sub(block.q, block.p, alpha=kd_lambda, out=block.gradient)
    add_at_labels(block.gradient, block.labels, kd_lambda - 1.0)


def _add_cross_entropy_gradient(block: Block) -> None:
    share = 1.0 - block.settings.kd_lambda
    block.gradient.add_(block.plain_q, alpha=share)
    add_at_labels(block.gradient, block.labels, -share)


def add_at_labels(matrix: torch.Tensor, labels: torch.Tensor, value: float) -> torch.Tensor:
    """Add to one entry of each row, in place."""
    if torch.compiler.is_compiling():  # a comparison joins the traversal, a scatter would end it
        columns = torch.arange(matrix.shape[-1], dtype=torch.int32, device=matrix.device)  # half the lanes of int64
        return matrix.add_((columns == labels.int()).to(matrix.dtype), alpha=value)
    return matrix.scatter_add_(-1, labels, matrix.new_full((len(labels), 1), value))


def _with_cross_entropy(block: Block, divergence: torch.Tensor) -> torch.Tensor:
    settings = block.settings
    divergence = settings.kd_temperature**2 * divergence
    # Not by a weight of zero: zero times an infinite divergence is NaN.
    if settings.kd_lambda >= 1.0:
        return divergence
    if settings.kd_lambda <= 0.0:
        return block.ce
    return (1.0 - settings.kd_lambda) * block.ce + settings.kd_lambda * divergence


def _scale(gradient: torch.Tensor, factor: float) -> None:
    if factor != 1.0:
        gradient.mul_(factor)
