"""The paper's equations and its baselines, as written: one value per token, differentiable by autograd.

First the parts: divergences (pure functions of log-probabilities), and mixtures of distributions in log space: the
target (equation 4) and the proxy (equation 6). Then the objectives: the hard tokens' loss is `skewed_kl`, the easy
tokens' `easy_kl`, and an objective chooses between them. At the end what training reports of every token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from llamafactory_sekd.objectives.objective_settings import Settings


def kl_divergence(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """`KL(a ‖ b) = Σ a (log a - log b)` over the last dimension, in nats.

    The first argument is the distribution the sum is weighted with (the target of forward KL); torch's own
    `kl_div` takes them in the opposite order. Entries with `a = 0` contribute exactly nothing, whatever `b` is; an
    entry with `a > 0` and `b = 0` makes the divergence infinite, as it is.

    Args:
        log_a: log-probabilities `[tokens, vocab]`, floating, `-inf` allowed.
        log_b: log-probabilities of the same shape and type.

    Returns:
        `[tokens]`, differentiable in both arguments.
    """
    weight = log_a.exp()
    # The masking comes before the product: -inf - (-inf) and 0 * inf would be NaN, in the value and in the gradient.
    ratio = torch.where(weight > 0, log_a - log_b, 0.0)
    return (weight * ratio).sum(-1)


def cross_entropy(log_q: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`-log q_y` of the ground truth.

    Args:
        log_q: log-probabilities `[tokens, vocab]`.
        labels: class ids `[tokens]`, all valid.

    Returns:
        `[tokens]`, differentiable in `log_q`.
    """
    return -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def log_mixture(log_a: torch.Tensor, log_b: torch.Tensor, weight: float) -> torch.Tensor:
    """`log(weight · a + (1 - weight) · b)` without leaving log space.

    Args:
        log_a, log_b: log-probabilities `[tokens, vocab]`, `-inf` allowed.
        weight: the share of `a`, in `[0, 1]`.

    Returns:
        Log-probabilities of the same shape. Where both shares are zero the result is a finite, very small number
        rather than `-inf`, because the gradient of `logaddexp(-inf, -inf)` is NaN; its probability is exactly zero.
    """
    if weight >= 1.0:
        return log_a
    smallest = torch.finfo(log_a.dtype).min / 4
    log_weight = math.log(weight) if weight > 0 else -math.inf
    return torch.logaddexp(log_a.clamp_min(smallest) + log_weight, log_b.clamp_min(smallest) + math.log1p(-weight))


def log_target(log_p: torch.Tensor, labels: torch.Tensor, kd_lambda: float) -> torch.Tensor:
    """Equation 4: `log y~` of `y~ = (1-λ) y + λ p`, the ground truth `y` mixed with the teacher `p`.

    Args:
        log_p: the teacher's log-probabilities `[tokens, vocab]`.
        labels: the ground truth's class ids `[tokens]`.
        kd_lambda: λ, the teacher's share, in `[0, 1]`.

    Returns:
        `[tokens, vocab]`; entries other than the ground truth are `-inf` for λ = 0.
    """
    target = log_p + (math.log(kd_lambda) if kd_lambda > 0 else -math.inf)
    if kd_lambda >= 1.0:
        return target
    index = labels.unsqueeze(-1)
    truth = torch.full_like(target.gather(-1, index), math.log1p(-kd_lambda))
    return target.scatter(-1, index, torch.logaddexp(target.gather(-1, index), truth))


@dataclass(frozen=True, slots=True)
class Terms:
    """What the objectives are made of.

    Attributes:
        log_q: the student at temperature T, `[tokens, vocab]`, carries the gradient.
        log_p: the teacher at temperature T, `[tokens, vocab]`, detached.
        log_target: `log y~`, equation 4, `[tokens, vocab]`, detached.
        ce: `-log q_y` at T = 1, `[tokens]`, carries the gradient.
        difficulty: equation 5, `d = KL(y~ ‖ q)`, `[tokens]`, detached.
        hard: bool `[tokens]`.
        settings: λ, β, T and the factor of the hard loss.
    """

    log_q: torch.Tensor
    log_p: torch.Tensor
    log_target: torch.Tensor
    ce: torch.Tensor
    difficulty: torch.Tensor
    hard: torch.Tensor
    settings: Settings


def easy_kl(terms: Terms) -> torch.Tensor:
    """Equation 8: `T² KL(y~ ‖ q)`."""
    return terms.settings.kd_temperature**2 * kl_divergence(terms.log_target, terms.log_q)


def skewed_kl(terms: Terms, log_target: torch.Tensor) -> torch.Tensor:
    """Equations 6 and 7: `T² KL(t ‖ β q + (1-β) t)` for a target `t`; the student also learns through the proxy."""
    log_proxy = log_mixture(terms.log_q, log_target, terms.settings.kd_beta)
    return terms.settings.kd_temperature**2 * kl_divergence(log_target, log_proxy)


def with_cross_entropy(terms: Terms, divergence: torch.Tensor) -> torch.Tensor:
    """Equation 3: `(1-λ) (-log q_y) + λ D`."""
    kd_lambda = terms.settings.kd_lambda
    # A weight of zero switches its term off even where the term is infinite.
    if kd_lambda >= 1.0:
        return divergence
    if kd_lambda <= 0.0:
        return terms.ce
    return (1.0 - kd_lambda) * terms.ce + kd_lambda * divergence


def self_evolution(terms: Terms) -> torch.Tensor:
    """Equation 7 for hard tokens, equation 8 for easy ones (Self-Evolution KD, and its top-K ablation)."""
    hard_loss, scale = skewed_kl(terms, terms.log_target), terms.settings.kd_hard_scale
    if scale is not None:
        hard_loss = hard_loss * scale
    return torch.where(terms.hard, hard_loss, easy_kl(terms))


@torch.no_grad()
def gradient_norms(terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """`‖q - y~‖` and `‖q Σr - r‖` with `r = β y~ q / q^`, `[tokens]`: see `TokenStatistics`."""
    beta, q, target = terms.settings.kd_beta, terms.log_q.exp(), terms.log_target.exp()
    proxy = beta * q + (1.0 - beta) * target
    r = torch.where(proxy > 0, beta * q * target / proxy, 0.0)
    easy, hard = q - target, q * r.sum(-1, keepdim=True) - r
    norms = [torch.linalg.vector_norm(gradient, dim=-1) for gradient in (easy, hard)]
    return norms[0].masked_fill(~terms.hard, 0.0), norms[1].masked_fill(~terms.hard, 0.0)


def no_evolution(terms: Terms) -> torch.Tensor:
    """Equation 8 for all tokens (NoEvo KD)."""
    return easy_kl(terms)


def skew(terms: Terms) -> torch.Tensor:
    """Equation 7 for all tokens (SKEW KD)."""
    return skewed_kl(terms, terms.log_target)


def skew_teacher(terms: Terms) -> torch.Tensor:
    """Equation 10: `(1-λ) (-log q_y) + λ T² KL(p ‖ β q + (1-β) p)` (SKEW KD (Teacher))."""
    return with_cross_entropy(terms, skewed_kl(terms, terms.log_p))


def forward_kl(terms: Terms) -> torch.Tensor:
    """Equation 3: `(1-λ) (-log q_y) + λ T² KL(p ‖ q)` (Forward KD)."""
    divergence = kl_divergence(terms.log_p, terms.log_q)
    return with_cross_entropy(terms, terms.settings.kd_temperature**2 * divergence)


def reverse_kl(terms: Terms) -> torch.Tensor:
    """`(1-λ) (-log q_y) + λ T² KL(q ‖ p)` (Reverse KD): the student's own distribution weights the sum."""
    divergence = kl_divergence(terms.log_q, terms.log_p)
    return with_cross_entropy(terms, terms.settings.kd_temperature**2 * divergence)


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """One value per response token, `[tokens]`, float32 (float64 for float64 inputs), detached.

    Attributes:
        difficulty: equation 5, `d = KL(y~ ‖ q)`, at the temperature of the objective and without its factor T².
        hard: 1 for hard tokens (see `DistillationOutput.hard`), 0 for easy ones.
        ce: `-log q_y`, the student's cross-entropy of the ground truth, at T = 1.
        teacher_kl: `KL(p ‖ q)` at T = 1.
        teacher_ce: `-log p_y`, the teacher's cross-entropy of the ground truth, at T = 1.
        agreement: 1 where the teacher's most probable entry is one of the student's most probable ones (they are one
            unless there is a tie), else 0.
        easy_norm, hard_norm: of hard tokens `‖q - y~‖` and `‖q Σr - r‖`, the Euclidean norms of the gradients that
            the easy and the hard loss have with respect to the logits, but for a factor T; 0 for easy tokens. None
            without `kd_hard_scale` or without a gradient.
        signal: what the gate of a formula looks at; the difficulty without a gate. None for other objectives. Where
            the gate has a width, `hard` is the degree to which the token is hard, from 0 to 1.
    """

    difficulty: torch.Tensor
    hard: torch.Tensor
    ce: torch.Tensor
    teacher_kl: torch.Tensor
    teacher_ce: torch.Tensor
    agreement: torch.Tensor
    easy_norm: torch.Tensor | None = None
    hard_norm: torch.Tensor | None = None
    signal: torch.Tensor | None = None

    @classmethod
    def from_rows(cls, rows: tuple[torch.Tensor, ...]) -> TokenStatistics:
        """Take apart what a pass returns: the six that there always are, then the signal or both norms or neither."""
        if len(rows) == 7:
            return cls(*rows[:6], signal=rows[6])
        return cls(*rows)

    @classmethod
    def joined(cls, parts: list[TokenStatistics], numbers: list[torch.Tensor]) -> TokenStatistics:
        """Put the statistics of groups of tokens back into the order of the tokens.

        Args:
            parts: the statistics of each group.
            numbers: int64 ``[tokens of the group]``: which tokens they are; together every token once.
        """
        order = torch.cat(numbers).argsort()
        joined: dict[str, Any] = {}
        for item in fields(cls):
            columns = [getattr(part, item.name) for part in parts]
            joined[item.name] = None if columns[0] is None else torch.cat(columns)[order]
        return cls(**joined)


def same_prediction(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Return where no student logit is above that of the teacher's most probable entry, bool `[tokens]`."""
    best = teacher_logits.argmax(-1, keepdim=True)
    return student_logits.gather(-1, best).squeeze(-1) == student_logits.amax(-1)


@torch.no_grad()
def token_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    difficulty: torch.Tensor,
    hard: torch.Tensor,
) -> TokenStatistics:
    """Compute the statistics from logits `[tokens, vocab]`, float32 or 64, and labels, difficulty, hard `[tokens]`."""
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return TokenStatistics(
        difficulty=difficulty,
        hard=hard.to(difficulty.dtype),
        ce=cross_entropy(log_q, labels),
        teacher_kl=kl_divergence(log_p, log_q),
        teacher_ce=cross_entropy(log_p, labels),
        agreement=same_prediction(student_logits, teacher_logits).to(difficulty.dtype),
    )
