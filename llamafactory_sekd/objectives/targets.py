"""Mixtures of distributions, in log space: the paper's target (equation 4) and proxy (equation 6)."""

from __future__ import annotations

import math

import torch


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
