"""Keys that follow the training: Γ as the running mean of what a gate looks at, and the factor of the hard loss.

Both are ratios of two sums over response tokens in which older steps weigh less. The sums stay on the device, are
reduced over the ranks once per optimizer step, and take effect in the next one: no extra pass, no wait for the device,
and within a step one value for all micro-batches and ranks, so that accumulation and ranks change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.formula import FIRST_MEANS
from llamafactory_sekd.objectives import TokenStatistics


# The weight of a step that is one step further back: the ratios look back over about ten steps.
DECAY = 0.9
# Where all hard tokens are beyond reach their gradients vanish, and the factor that makes up for it has no bound; one
# token within reach among the next would blow up. Small pretrained models need 10.
LARGEST_SCALE = 100.0


@dataclass(frozen=True)
class _Ratio:
    """How a key follows the training.

    Attributes:
        start: its value before anything was seen.
        largest: its bound.
        terms: from statistics, and which of the tokens count (bool ``[tokens]``), to numerator and denominator of
            every token, both ``[tokens]``.
    """

    start: float
    largest: float
    terms: Callable[[TokenStatistics, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _mean_signal(statistics: TokenStatistics, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    signal = statistics.difficulty if statistics.signal is None else statistics.signal
    counts = counts & signal.isfinite()  # one infinite token would raise Γ to infinity for good
    return signal.masked_fill(~counts, 0.0), counts


def _gradient_norms(statistics: TokenStatistics, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    easy, hard = statistics.easy_norm, statistics.hard_norm
    assert easy is not None  # the objective measures both wherever it has a factor and a gradient
    assert hard is not None
    return easy.masked_fill(~counts, 0.0), hard.masked_fill(~counts, 0.0)


def _followed(distillation: DistillationArguments) -> dict[str, _Ratio]:
    followed = {}
    gate = distillation.formula().gate
    if gate is not None and distillation.follows_mean:
        # The first step has no step before it, and its own mean would need a pass over the step's data. All ranks and
        # micro-batches know this number.
        followed["kd_gamma"] = _Ratio(FIRST_MEANS[gate.signal], float("inf"), _mean_signal)
    if distillation.kd_hard_scale != "none":
        followed["kd_hard_scale"] = _Ratio(1.0, LARGEST_SCALE, _gradient_norms)
    return followed


class AdaptiveKeys:
    """The present values of the keys that follow the training.

    Args:
        distillation: the stage's keys; a gate by the mean, which `kd_gamma: auto` is, and `kd_hard_scale: balanced`
            are followed.
        device: where the sums are kept.
    """

    def __init__(self, distillation: DistillationArguments, device: torch.device) -> None:
        self._ratios = _followed(distillation)
        ratios = self._ratios.values()
        self._starts = torch.tensor([ratio.start for ratio in ratios], dtype=torch.float64, device=device)
        self._bounds = torch.tensor([ratio.largest for ratio in ratios], dtype=torch.float64, device=device)
        self._sums = torch.zeros(len(ratios), 2, dtype=torch.float64, device=device)
        self._step: torch.Tensor | None = None
        self._values = self._used = self._starts

    def keywords(self) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of the objective, each a 0-dimensional tensor; the same on all ranks."""
        return dict(zip(self._ratios, self._values.unbind(), strict=True))

    def add(self, statistics: TokenStatistics) -> None:
        """Add a micro-batch of the present step; a `teacher_ce` of NaN marks a token that was left out."""
        if not self._ratios:
            return

        counts = ~statistics.teacher_ce.isnan()
        terms = [ratio.terms(statistics, counts) for ratio in self._ratios.values()]
        sums = torch.stack([torch.stack([term.sum(dtype=torch.float64) for term in pair]) for pair in terms])
        self._step = sums if self._step is None else self._step + sums

    def advance(self, accelerator: Any) -> None:
        """End an optimizer step. All ranks call this together."""
        if self._step is None:
            return

        step = accelerator.reduce(self._step.to(self._sums.device), reduction="sum")
        self._used, self._step = self._values, None
        self._set(DECAY * self._sums + step)

    def logs(self) -> dict[str, float]:
        """Return the values that the step which just ended was trained with, by the names of metrics."""
        names = [name.replace("kd_", "kd/", 1) for name in self._ratios]
        return dict(zip(names, self._used.tolist(), strict=True)) if names else {}

    def state(self) -> dict[str, list[float]]:
        """Return what a checkpoint holds of them after a step: numerator and denominator of each."""
        return dict(zip(self._ratios, self._sums.tolist(), strict=True))

    def restore(self, state: dict[str, list[float]], accelerator: Any) -> None:
        """Continue from what `state` returned.

        All ranks call this together, one of them with the state and the others with an empty one: ranks that read
        different files would silently train different objectives.
        """
        if self._ratios:
            sums = torch.tensor([state.get(name, [0.0, 0.0]) for name in self._ratios], dtype=torch.float64)
            self._set(accelerator.reduce(sums.to(self._sums.device), reduction="sum"))

    def _set(self, sums: torch.Tensor) -> None:
        numerators, denominators = sums.unbind(-1)
        self._sums = sums
        self._values = torch.where(denominators > 0, numerators / denominators, self._starts).minimum(self._bounds)


class EndOfStep(TrainerCallback):
    """Ends a step of these keys before anything of it is logged, evaluated or saved."""

    def __init__(self, adaptive: AdaptiveKeys, accelerator: Any) -> None:
        self.adaptive = adaptive
        self.accelerator = accelerator

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Move the adaptive values on."""
        self.adaptive.advance(self.accelerator)
