"""The objectives of the paper and its baselines, as equations: one value per token, differentiable by autograd.

The hard tokens' loss lives in `skewed_kl`, the easy tokens' in `easy_kl`; an objective chooses between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llamafactory_sekd.objectives.divergences import kl_divergence
from llamafactory_sekd.objectives.objective_settings import Settings
from llamafactory_sekd.objectives.targets import log_mixture


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
