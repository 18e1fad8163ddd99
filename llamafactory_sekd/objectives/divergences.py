"""Divergences: pure functions of two log-probability tensors that return one value per token."""

from __future__ import annotations

import torch


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
