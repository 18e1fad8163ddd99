"""Means over response tokens, summed on the device and read once per logging window."""

from __future__ import annotations

from typing import Any

import torch

from llamafactory_sekd.objectives import TokenStatistics


# Metric -> the statistic that it is the mean of.
METRICS: dict[str, str] = {
    "kd/difficulty": "difficulty",
    "kd/hard_ratio": "hard",
    "kd/ce": "ce",
    "kd/teacher_kl": "teacher_kl",
    "kd/teacher_ce": "teacher_ce",
    "kd/agreement": "agreement",
}


# Share of the response tokens that were left out because the teacher's logits were NaN or infinite; absent where none.
NONFINITE = "kd/teacher_nonfinite"


class TokenMeans:
    """Sums of token statistics since the last reading; adding costs no synchronization with the host."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None

    def add(self, statistics: TokenStatistics, loss: torch.Tensor) -> None:
        """Add a micro-batch.

        Args:
            statistics: per token, each ``[tokens]``; a `teacher_ce` of NaN marks a token that was left out.
            loss: the objective summed over these tokens, a scalar.
        """
        left_out = statistics.teacher_ce.isnan()
        columns = [getattr(statistics, name).masked_fill(left_out, 0.0) for name in METRICS.values()]
        totals = [(~left_out).sum(), left_out.sum(), loss, *(column.sum(dtype=torch.float64) for column in columns)]
        sums = torch.stack([total.double() for total in totals])
        self.sums = sums if self.sums is None else self.sums + sums

    def read(self, accelerator: Any) -> tuple[float | None, dict[str, float]]:
        """Return the mean loss and the mean of each metric over all ranks, and start over.

        All ranks call this together. Without any response token there are no means: None and an empty dict.
        """
        count, left_out, loss, *rest = self.total(accelerator)
        self.sums = None
        nonfinite = {NONFINITE: left_out / (count + left_out)} if left_out else {}
        if count == 0:
            return None, nonfinite

        return loss / count, {name: total / count for name, total in zip(METRICS, rest, strict=True)} | nonfinite

    def total(self, accelerator: Any) -> list[float]:
        """Return the sums of all ranks, which call this together, and keep them."""
        sums = self.sums if self.sums is not None else torch.zeros(len(METRICS) + 3, dtype=torch.float64)
        return accelerator.reduce(sums.to(accelerator.device, copy=True), reduction="sum").tolist()

    def restore(self, sums: list[float], device: torch.device) -> None:
        """Continue from what `total` returned; an empty list starts over. One rank does this for all."""
        self.sums = torch.tensor(sums, dtype=torch.float64, device=device) if sums else None
