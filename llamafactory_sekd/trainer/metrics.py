"""Means over response tokens, summed on the device and read once per logging window."""

from __future__ import annotations

from collections.abc import Sequence
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


# What is reported of each of several teachers, over the response tokens that it has a say on.
OF_TEACHER: dict[str, str] = {"teacher_kl": "teacher_kl", "teacher_ce": "teacher_ce"}
SHARE = "share"  # of the response tokens, those that a teacher has a say on


class TokenMeans:
    """Sums of token statistics since the last reading; adding costs no synchronization with the host.

    Args:
        teachers: the names of several teachers; their own means are ``kd/<name>/…``.
        signal: what the gate of a formula looks at, which is then a metric too; None for what is one anyway.
    """

    def __init__(self, teachers: Sequence[str] = (), signal: str | None = None) -> None:
        self.teachers = teachers
        self.sums: torch.Tensor | None = None
        self.metrics = METRICS | ({f"kd/{signal}": "signal"} if signal else {})

    def add(self, statistics: TokenStatistics, loss: torch.Tensor, who: torch.Tensor | None = None) -> None:
        """Add a micro-batch.

        Args:
            statistics: per token, each ``[tokens]``; a `teacher_ce` of NaN marks a token that was left out.
            loss: the objective summed over these tokens, a scalar.
            who: bool ``[tokens, teachers]``, which of several teachers have a say on each token.
        """
        left_out = statistics.teacher_ce.isnan()
        columns = [getattr(statistics, name).masked_fill(left_out, 0.0) for name in self.metrics.values()]
        totals = [(~left_out).sum(), left_out.sum(), loss, *(column.sum(dtype=torch.float64) for column in columns)]
        for number in range(len(self.teachers)):
            assert who is not None
            lacks = left_out | ~who[:, number].to(left_out.device)
            totals.append((~lacks).sum())
            for name in OF_TEACHER.values():
                totals.append(getattr(statistics, name).masked_fill(lacks, 0.0).sum(dtype=torch.float64))

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

        means = {name: total / count for name, total in zip(self.metrics, rest, strict=False)}
        return loss / count, means | self._of_teachers(count, rest[len(self.metrics) :]) | nonfinite

    def total(self, accelerator: Any) -> list[float]:
        """Return the sums of all ranks, which call this together, and keep them."""
        sums = self.sums if self.sums is not None else torch.zeros(self._length(), dtype=torch.float64)
        return accelerator.reduce(sums.to(accelerator.device, copy=True), reduction="sum").tolist()

    def restore(self, sums: list[float], device: torch.device) -> None:
        """Continue from what `total` returned; an empty list, or one of other metrics or teachers, starts over.

        One rank does this for all.
        """
        fits = len(sums) == self._length()
        self.sums = torch.tensor(sums, dtype=torch.float64, device=device) if fits else None

    def _length(self) -> int:
        return 3 + len(self.metrics) + len(self.teachers) * (1 + len(OF_TEACHER))

    def _of_teachers(self, count: float, sums: Sequence[float]) -> dict[str, float]:
        means: dict[str, float] = {}
        width = 1 + len(OF_TEACHER)
        for number, teacher in enumerate(self.teachers):
            own, *totals = sums[number * width : (number + 1) * width]
            means[f"kd/{teacher}/{SHARE}"] = own / count
            if own:
                means |= {f"kd/{teacher}/{name}": total / own for name, total in zip(OF_TEACHER, totals, strict=True)}

        return means
