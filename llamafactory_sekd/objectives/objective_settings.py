"""What selects and shapes an objective: the `kd_*` keys that reach the mathematics, and which tokens are hard by them.

That is by a threshold (the paper's Γ) or by their share of the batch (its top-K ablation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.formula import MEAN, Formula, Gate
from llamafactory_sekd.presets import DEFAULT_LOSS, DEFAULTS, expand


class ObjectiveKeys(TypedDict, total=False):
    """The `kd_*` arguments of an objective; what is not given has the default of `presets.DEFAULTS`.

    Attributes:
        kd_loss: the objective: a preset's name, a mapping of the formula, or a `Formula` (docs/objectives.md).
        kd_lambda: λ of equations 3, 4 and 10, the teacher's share, in `[0, 1]`.
        kd_beta: β of equations 6 and 10, the student's share of the proxy, in `[0, 1]`.
        kd_gamma: Γ, the difficulty above which a token is hard; a number or a 0-dimensional tensor.
        kd_topk: for `self_evolution_topk`, the share of hard tokens in this batch, in `(0, 1]`.
        kd_temperature: T > 0. The KL terms take both distributions at T and are multiplied by T²; `-log q_y` and the
            statistics stay at T = 1, except `difficulty`, which is at T and carries no factor.
        kd_hard_scale: a factor of the hard tokens' loss, a number or a 0-dimensional tensor, for the two
            Self-Evolution objectives. With one the statistics hold the gradient norms that it can be chosen from.
    """

    kd_loss: str | Mapping[str, Any] | Formula
    kd_lambda: float
    kd_beta: float
    kd_gamma: float | torch.Tensor
    kd_topk: float | None
    kd_temperature: float
    kd_hard_scale: float | torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Settings:
    """The `kd_*` keys under their YAML names. Their ranges are checked where the YAML is read.

    With a `formula` they are what the measurements need: λ and T of its easy tokens, and what its gate's signal, times
    the gate's sign, is held against.
    """

    kd_loss: str = DEFAULT_LOSS
    kd_lambda: float = DEFAULTS["kd_lambda"]
    kd_beta: float = DEFAULTS["kd_beta"]
    kd_gamma: float | torch.Tensor = DEFAULTS["kd_gamma"]
    kd_topk: float | None = DEFAULTS["kd_topk"]
    kd_temperature: float = DEFAULTS["kd_temperature"]
    kd_hard_scale: float | torch.Tensor | None = None
    formula: Formula | None = None

    @property
    def share(self) -> float | None:
        """The share of tokens that are hard, None where a threshold decides."""
        if self.formula is None:
            return self.kd_topk if self.kd_loss == "self_evolution_topk" else None
        return None if self.formula.gate is None else self.formula.gate.share


def formula_settings(kd_loss: str | Mapping[str, Any] | Formula, **keys: Any) -> Settings:
    """Return the settings of an objective that is computed by the formula.

    Args:
        kd_loss: the name of a preset, a mapping, or a formula; of numbers that move it takes where they start.
        keys: the other `kd_*` keys; `kd_gamma` is the running mean where the gate's threshold is that.

    Raises:
        ArgumentError: the preset is unknown, or the mapping cannot work.
    """
    keys = {**DEFAULTS, **keys}
    if keys.pop("kd_hard_scale", None) is not None:
        raise ArgumentError(f"`kd_loss: {kd_loss}` does not read `kd_hard_scale`: leave it out.")
    formula = kd_loss if isinstance(kd_loss, Formula) else expand(kd_loss, keys)
    formula = formula.at(lambda start, _: start)
    gate: Gate | None = formula.gate
    gamma: Any = float("inf")
    if gate is not None and gate.threshold is not None:
        gamma = gate.sign * (keys["kd_gamma"] if gate.threshold == MEAN else gate.threshold)
    return Settings(
        kd_loss=kd_loss if isinstance(kd_loss, str) else "formula",
        kd_lambda=formula.easy.kd_lambda,
        kd_gamma=gamma,
        kd_temperature=formula.easy.temperature,
        formula=formula,
    )


def check_tokens(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, names: tuple[str, str]) -> None:
    """Both tensors are `[tokens, …]`, the labels `[tokens]`; anything else is an `ArgumentError`."""
    for name, tensor in zip(names, (student, teacher), strict=True):
        if tensor.dim() != 2:
            raise ArgumentError(
                f"{name} has shape {list(tensor.shape)}: two dimensions are needed, the first runs over the response "
                "tokens; flatten batch and length and keep the response positions only."
            )
    if labels.dim() != 1 or len(student) != len(labels) or len(teacher) != len(labels):
        raise ArgumentError(
            f"{names[0]} {list(student.shape)}, {names[1]} {list(teacher.shape)} and labels {list(labels.shape)} "
            "disagree about the number of tokens: pass one row and one label for every response token."
        )


def check_same_vocabulary(student_entries: int, teacher_entries: int, remedy: str) -> None:
    """Refuse a distribution over another vocabulary, which cannot be a target, with the remedy."""
    if student_entries != teacher_entries:
        raise ArgumentError(
            f"the student has {student_entries} vocabulary entries, the teacher {teacher_entries}: {remedy}"
        )


def above_threshold(difficulty: torch.Tensor, gamma: float | torch.Tensor) -> torch.Tensor:
    """Hard tokens are those with `d > Γ` (a token exactly at Γ is easy).

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


class ShareGuess:
    """The score above which a share of the tokens is, guessed from those that have been seen.

    Args:
        share: of the tokens that are hard.
        sample: scores of a few tokens, `[some]`, forgotten when others have been seen.

    Attributes:
        threshold: 0-dimensional.
    """

    def __init__(self, share: float, sample: torch.Tensor) -> None:
        self.share, self.threshold = share, _share_threshold(sample, share)
        self._scores: list[torch.Tensor] = []
        self._seen = self._rests_on = 0

    def see(self, scores: torch.Tensor) -> None:
        """Take in the scores of further tokens."""
        self._scores.append(scores)
        self._seen += len(scores)
        # The guess from n tokens is off by 1/√n; to sort them again for a few more would gain nothing.
        if self._seen > 1.1 * self._rests_on:
            self.threshold, self._rests_on = _share_threshold(torch.cat(self._scores), self.share), self._seen


def _share_threshold(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Return a score above which about this share of these tokens is, 0-dimensional."""
    number = int(share * len(scores) + 0.5)
    # The place after the last hard token; where all are hard there is none.
    return torch.cat([scores.sort(descending=True).values, scores.new_full((1,), -torch.inf)])[number]


def select_hard(scores: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Return the selection that an objective asks for, bool `[tokens]`.

    Every objective of the paper but `self_evolution_topk` reports the tokens with `d > Γ` as hard, so that the hard
    share can be compared between objectives, also where its loss treats all tokens alike.

    Args:
        scores: the difficulty, or what a formula's gate looks at, `[tokens]`.
        settings: Γ or the share.
    """
    share = settings.share
    return above_threshold(scores, settings.kd_gamma) if share is None else largest_share(scores, share)
