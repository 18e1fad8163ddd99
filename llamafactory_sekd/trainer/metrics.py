"""Means over response tokens, summed on the device and read once per logging window."""

from __future__ import annotations

from typing import Any

import torch

from ..objectives import TokenStatistics


# Metric -> the statistic that it is the mean of.
METRICS: dict[str, str] = {
    "kd/difficulty": "difficulty",
    "kd/hard_ratio": "hard",
    "kd/ce": "ce",
    "kd/teacher_kl": "teacher_kl",
    "kd/teacher_ce": "teacher_ce",
    "kd/agreement": "agreement",
}


class TokenMeans:
    """Sums of token statistics since the last reading; adding costs no synchronisation with the host."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None

    def add(self, statistics: TokenStatistics, loss: torch.Tensor) -> None:
        """Add a micro-batch.

        Args:
            statistics: per token, each ``[tokens]``.
            loss: the objective summed over these tokens, a scalar.
        """
        columns = [getattr(statistics, name) for name in METRICS.values()]
        count = torch.full_like(loss, columns[0].numel(), dtype=torch.float64)
        sums = torch.stack([count, loss.double(), *(column.sum(dtype=torch.float64) for column in columns)])
        self.sums = sums if self.sums is None else self.sums + sums

    def read(self, accelerator: Any) -> tuple[float | None, dict[str, float]]:
        """Return the mean loss and the mean of each metric over all ranks, and start anew.

        All ranks call this together. Without any response token there are no means: None and an empty dict.
        """
        sums = self.sums if self.sums is not None else torch.zeros(len(METRICS) + 2, dtype=torch.float64)
        self.sums = None
        count, loss, *rest = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
        if count == 0:
            return None, {}

        return loss / count, {name: total / count for name, total in zip(METRICS, rest, strict=True)}
