"""What trainings logged: metrics over the steps, and the difficulty of tokens by their frequency."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from llamafactory_sekd.arguments import STAGE, TOKEN_TABLE
from llamafactory_sekd.files import read_json
from llamafactory_sekd.study.report.cells import Cell, Group, Study, Summary, is_number, paired_cells, summarize


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


# Each class of tokens makes up about this share of the training's response tokens.
CLASSES = 5
METRICS = ("difficulty", "hard")
_Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class TokenClasses:
    """The tokens of the training text in classes of equal mass, the most frequent first.

    Attributes:
        sizes: how many different tokens each class has.
        means: group -> metric -> class, the mean over the tokens' occurrences, over seeds; absent without a table.
    """

    sizes: tuple[int, ...]
    means: Mapping[Group, Mapping[str, tuple[Summary | None, ...]]]


def token_classes(study: Study, groups: Sequence[Group]) -> TokenClasses | None:
    """Return the means of all groups that have tables; None where no group has one."""
    tables = {group: [_read(study.root, cell) for cell in group.cells.values()] for group in groups}
    tables = {group: found for group, seeds in tables.items() if (found := [table for table in seeds if table])}
    if not tables:
        return None
    # The text is the same for all of them, so one table tells the frequencies.
    counts = {token: row["count"] for token, row in next(iter(tables.values()))[0].items()}
    class_of = _classes(counts)
    sizes = tuple(sum(one == index for one in class_of.values()) for index in range(CLASSES))
    means = {
        group: {
            metric: tuple(
                summarize(_mean_of_class(table, class_of, index, metric) for table in seeds)
                for index in range(CLASSES)
            )
            for metric in METRICS
        }
        for group, seeds in tables.items()
    }
    return TokenClasses(sizes, means)


def _read(root: Path, cell: Cell) -> _Table:
    path = root / cell["model"] / TOKEN_TABLE
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="surrogatepass", newline="") as file:
        return {row["id"]: {key: float(row[key]) for key in ("count", *METRICS)} for row in csv.DictReader(file)}


def _classes(counts: Mapping[str, float]) -> dict[str, int]:
    """Return token -> class. A token belongs where the middle of its mass is."""
    ordered = sorted(counts, key=lambda token: (-counts[token], int(token)))
    ends = accumulate(counts[token] for token in ordered)
    total = sum(counts.values())
    return {token: int(CLASSES * (end - counts[token] / 2) / total) for token, end in zip(ordered, ends, strict=True)}


def _mean_of_class(
    table: Mapping[str, Mapping[str, float]], class_of: Mapping[str, int], index: int, metric: str
) -> float | None:
    rows = [row for token, row in table.items() if class_of.get(token, CLASSES - 1) == index]
    mass = sum(row["count"] for row in rows)
    return sum(row["count"] * row[metric] for row in rows) / mass if mass else None
