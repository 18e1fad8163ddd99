"""The objectives by their `kd_loss` name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.objectives.losses import equations


OBJECTIVES: dict[str, Callable[[equations.Terms], torch.Tensor]] = {
    "self_evolution": equations.self_evolution,
    "self_evolution_topk": equations.self_evolution,  # differs in how the hard tokens are selected
    "no_evolution": equations.no_evolution,
    "skew": equations.skew,
    "skew_teacher": equations.skew_teacher,
    "forward_kl": equations.forward_kl,
    "reverse_kl": equations.reverse_kl,
}


def check_objective(kd_loss: str) -> None:
    """An unknown `kd_loss` is an `ArgumentError` that lists the known ones."""
    if kd_loss not in OBJECTIVES:
        raise ArgumentError(f"`kd_loss: {kd_loss}` is unknown: choose one of {', '.join(OBJECTIVES)}.")
