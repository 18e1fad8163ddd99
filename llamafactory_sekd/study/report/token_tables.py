"""Difficulty by the frequency of tokens, from the tables that the distillation stage writes."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from llamafactory_sekd.arguments import TOKEN_TABLE
from llamafactory_sekd.study.report.cells import Cell, Group, Study, Summary, summarize


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
                summarize(_mean(table, class_of, index, metric) for table in seeds) for index in range(CLASSES)
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


def _mean(
    table: Mapping[str, Mapping[str, float]], class_of: Mapping[str, int], index: int, metric: str
) -> float | None:
    rows = [row for token, row in table.items() if class_of.get(token, CLASSES - 1) == index]
    mass = sum(row["count"] for row in rows)
    return sum(row["count"] * row[metric] for row in rows) / mass if mass else None
