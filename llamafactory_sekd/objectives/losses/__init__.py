"""The objectives with closed forms of their own, by their `kd_loss` name; all others are computed by the formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llamafactory_sekd.errors import ArgumentError, suggestion
from llamafactory_sekd.objectives import equations
from llamafactory_sekd.objectives.losses import closed_forms, generic
from llamafactory_sekd.objectives.objective_settings import ObjectiveKeys, Settings, formula_settings
from llamafactory_sekd.presets import DEFAULT_LOSS


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


def is_formula(kd_loss: Any) -> bool:
    """Whether an objective has no closed form of its own and is computed by the formula."""
    return not isinstance(kd_loss, str) or kd_loss not in OBJECTIVES


def settings_of(**keys: Any) -> Settings:
    """Return the settings of an objective, from the `kd_*` arguments of `distillation_loss`.

    Raises:
        ArgumentError: an unknown argument, an unknown `kd_loss` or a mapping that cannot work, a missing `kd_topk`, or
            a `kd_hard_scale` for an objective without hard tokens.
    """
    known = ObjectiveKeys.__annotations__
    for key in keys:
        if key not in known:
            raise ArgumentError(f"`{key}` is no argument of an objective{suggestion(key, known)}")
    kd_loss = keys.get("kd_loss", DEFAULT_LOSS)
    if is_formula(kd_loss):
        return formula_settings(**{"kd_loss": kd_loss, **keys})
    if keys.get("kd_hard_scale") is not None and OBJECTIVES[kd_loss].equation is not equations.self_evolution:
        raise ArgumentError(f"`kd_loss: {kd_loss}` treats all tokens alike: leave `kd_hard_scale` out.")
    if kd_loss == "self_evolution_topk" and keys.get("kd_topk") is None:
        raise ArgumentError(
            "`kd_topk` is missing: `kd_loss: self_evolution_topk` needs the share of hard tokens, above 0 and "
            "up to 1, such as 0.5."
        )
    return Settings(**keys)


def closed_form_of(settings: Settings) -> Callable[[closed_forms.Block], torch.Tensor]:
    """Return what turns a block of tokens into losses and gradients."""
    return generic.formula if settings.formula is not None else OBJECTIVES[settings.kd_loss].closed_form
