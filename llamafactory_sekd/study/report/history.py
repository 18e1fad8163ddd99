"""What happened during training: a metric over the steps, averaged over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.arguments import STAGE
from llamafactory_sekd.files import read_json
from llamafactory_sekd.study.report.cells import Cell, Group, Summary, is_number, summarize
from llamafactory_sekd.study.report.paired import paired_cells


# Logged points of one curve; more of them are averaged in equal windows.
POINTS = 50


@dataclass(frozen=True)
class Curve:
    """``summaries`` over the seeds at each of ``steps``."""

    steps: tuple[float, ...]
    summaries: tuple[Summary, ...]


class Histories:
    """Read the cells' ``trainer_state.json`` once; a cell without one has no curves."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._logs: dict[str, list[dict[str, Any]]] = {}

    def curve(self, group: Group, metric: str, baseline: Group | None = None) -> Curve | None:
        """Return the curve of a metric at the steps that all seeds have, None without any.

        With ``baseline`` it is the difference to that group, seed by seed.
        """
        if baseline is None:
            seeds = [self._series(cell, metric) for cell in group.cells.values()]
        else:
            pairs = paired_cells(group, baseline)
            seeds = [_minus(self._series(one, metric), self._series(other, metric)) for one, other in pairs]
        seeds = [series for series in seeds if series]
        if not seeds:
            return None
        steps = sorted(set.intersection(*(set(series) for series in seeds)))
        if not steps:
            return None
        windows = _windows(steps)
        means = [[_mean([series[step] for step in window]) for series in seeds] for window in windows]
        summaries = tuple(summary for values in means if (summary := summarize(values)) is not None)
        return Curve(tuple(_mean(window) for window in windows), summaries)

    def _series(self, cell: Cell, metric: str) -> dict[int, float]:
        """Return step -> value. The NLL of the host's SFT, which has no ``kd/*``, is its loss."""
        log = self._log(cell)
        if metric.endswith("kd/ce") and (cell.get("config") or {}).get("stage") != STAGE:
            metric = metric.replace("_kd/ce", "_loss").replace("kd/ce", "loss")
        return {entry["step"]: entry[metric] for entry in log if "step" in entry and is_number(entry.get(metric))}

    def _log(self, cell: Cell) -> list[dict[str, Any]]:
        path = cell.get("history")
        if not path:
            return []
        if path not in self._logs:
            state = read_json(self._root / path)
            self._logs[path] = state.get("log_history", []) if isinstance(state, dict) else []
        return self._logs[path]


def _minus(series: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    return {step: value - other[step] for step, value in series.items() if step in other}


def _windows(steps: Sequence[int]) -> list[Sequence[int]]:
    size = -(-len(steps) // POINTS)
    return [steps[start : start + size] for start in range(0, len(steps), size)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
