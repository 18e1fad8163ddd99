"""The objectives by their `kd_loss` name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.objectives.losses import closed_forms, equations


@dataclass(frozen=True, slots=True)
class Objective:
    """One objective, twice.

    Attributes:
        equation: the loss of every token by autograd, for the plain path.
        closed_form: the same with its gradient written out, for the fused path.
    """

    equation: Callable[[equations.Terms], torch.Tensor]
    closed_form: Callable[[closed_forms.Block], torch.Tensor]


# The two Self-Evolution objectives differ only in how the hard tokens are selected.
OBJECTIVES: dict[str, Objective] = {
    "self_evolution": Objective(equations.self_evolution, closed_forms.self_evolution),
    "self_evolution_topk": Objective(equations.self_evolution, closed_forms.self_evolution),
    "no_evolution": Objective(equations.no_evolution, closed_forms.no_evolution),
    "skew": Objective(equations.skew, closed_forms.skew),
    "skew_teacher": Objective(equations.skew_teacher, closed_forms.skew_teacher),
    "forward_kl": Objective(equations.forward_kl, closed_forms.forward_kl),
    "reverse_kl": Objective(equations.reverse_kl, closed_forms.reverse_kl),
}


def check_objective(kd_loss: str, kd_hard_scale: float | torch.Tensor | None) -> None:
    """Refuse an unknown `kd_loss`, naming the known ones, and a factor that it does not read."""
    if kd_loss not in OBJECTIVES:
        raise ArgumentError(f"`kd_loss: {kd_loss}` is unknown: choose one of {', '.join(OBJECTIVES)}.")
    if kd_hard_scale is not None and OBJECTIVES[kd_loss].equation is not equations.self_evolution:
        raise ArgumentError(f"`kd_loss: {kd_loss}` treats all tokens alike: leave `kd_hard_scale` out.")
