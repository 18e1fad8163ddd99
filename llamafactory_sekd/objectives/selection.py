"""Which tokens are hard: by a threshold (the paper's Γ) or by their share of the batch (its top-K ablation)."""

from __future__ import annotations

import torch

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.objectives.settings import Settings


def above_threshold(difficulty: torch.Tensor, gamma: float | torch.Tensor) -> torch.Tensor:
    """Hard tokens are those with `d > Γ` (a token that lies exactly on Γ is easy).

    Args:
        difficulty: `d`, `[tokens]`.
        gamma: Γ, a number or a 0-dimensional tensor; `inf` makes every token easy, a negative value every token hard.

    Returns:
        bool `[tokens]`.
    """
    return difficulty > gamma


def largest_share(difficulty: torch.Tensor, share: float) -> torch.Tensor:
    """Hard tokens are the `share` of the batch with the largest `d`.

    Their number is `share · tokens`, rounded to the nearest integer and half up. Of tokens that are equally difficult
    the earlier one is taken first, so that the result does not depend on the device's sorting.

    Args:
        difficulty: `d`, `[tokens]`.
        share: the share of hard tokens, in `[0, 1]`.

    Returns:
        bool `[tokens]`.
    """
    number = min(int(share * len(difficulty) + 0.5), len(difficulty))
    order = torch.sort(difficulty, descending=True, stable=True).indices
    hard = torch.zeros_like(difficulty, dtype=torch.bool)
    hard[order[:number]] = True
    return hard


def share_threshold(difficulty: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Return a difficulty above which about the share `kd_topk` of these tokens lies, 0-dimensional.

    Raises:
        ArgumentError: `kd_topk` is missing.
    """
    number = int(_share(settings) * len(difficulty) + 0.5)
    # The place after the last hard token; where all are hard there is none.
    return torch.cat([difficulty.sort(descending=True).values, difficulty.new_full((1,), -torch.inf)])[number]


def select_hard(difficulty: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Return the selection that `kd_loss` asks for, bool `[tokens]`.

    Every objective but `self_evolution_topk` reports the tokens with `d > Γ` as hard, so that the hard share can be
    compared between objectives, also where its loss treats all tokens alike.

    Raises:
        ArgumentError: `self_evolution_topk` without `kd_topk`.
    """
    if settings.kd_loss != "self_evolution_topk":
        return above_threshold(difficulty, settings.kd_gamma)
    return largest_share(difficulty, _share(settings))


def _share(settings: Settings) -> float:
    if settings.kd_topk is None:
        raise ArgumentError(
            "`kd_topk` is missing: `kd_loss: self_evolution_topk` needs the share of hard tokens, above 0 and "
            "up to 1, such as 0.5."
        )
    return settings.kd_topk
