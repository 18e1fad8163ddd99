"""The report's contents, computed once for all its forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamafactory_sekd.evaluation.report.examples import Example, most_different
from llamafactory_sekd.evaluation.results import Evaluated
from llamafactory_sekd.evaluation.significance import is_significant


METRIC_LABELS = {"bleu": "BLEU", "chrf": "chrF2", "comet": "COMET"}
# COMET is shown times 100, as papers do; results.json keeps the library's own scale.
METRIC_SCALES = {"bleu": 1.0, "chrf": 1.0, "comet": 100.0}
GUARD_LABELS = {
    "empty": "empty",
    "wrong_language": "wrong language",
    "repetition": "repetition loop",
    "hit_max_new_tokens": "hit max_new_tokens",
    "length_ratio": "length ratio",
}
# Above these shares a guard stands out; the length ratio does outside of 0.8 to 1.25.
GUARD_LIMITS = {"empty": 0.001, "wrong_language": 0.02, "repetition": 0.005, "hit_max_new_tokens": 0.01}
AVERAGE = "average"


@dataclass(frozen=True)
class Cell:
    """A score as it is shown.

    ``delta`` and ``significant`` are the difference to the baseline and its †, ``p`` that of the test. ``best``
    marks the best of a column; the teacher takes no part in that, for it nearly always wins.
    """

    value: float | None
    delta: float | None = None
    significant: bool = False
    best: bool = False
    p: float | None = None

    @property
    def text(self) -> str:
        """Return the score as it is printed."""
        return "–" if self.value is None else f"{self.value:.1f}".replace("-", "−")

    @property
    def delta_text(self) -> str:
        """Return the difference to the baseline as it is printed, with † where it is significant."""
        if self.delta is None:
            return ""
        shown = f"{self.delta:+.1f}".replace("-", "−")
        return f"{shown}{'†' if self.significant else ''}"


@dataclass(frozen=True)
class Row:
    """One system's scores; ``cells[column][metric]`` with the directions and the average as columns."""

    system: str
    cells: Mapping[str, Mapping[str, Cell]]
    is_baseline: bool
    is_teacher: bool


@dataclass(frozen=True)
class GuardCell:
    """A guard's figure as it is shown."""

    text: str
    alarming: bool


@dataclass(frozen=True)
class View:
    """Everything the report says. ``columns`` are the directions and, where there are several, the average."""

    results: Mapping[str, Any]
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    similarity: Mapping[str, Mapping[str, float | None]]
    guards: Mapping[str, Mapping[str, Mapping[str, GuardCell]]]
    examples: tuple[Example, ...]

    @property
    def main_metrics(self) -> tuple[str, ...]:
        """The metrics of the paper's Table 1; chrF2 has a table of its own where they exist."""
        main = tuple(metric for metric in self.metrics if metric != "chrf")
        return main or self.metrics

    @property
    def other_metrics(self) -> tuple[str, ...]:
        """Return the metrics that have a table of their own."""
        return tuple(metric for metric in self.metrics if metric not in self.main_metrics)


def build_view(data: Evaluated, results: dict[str, Any]) -> View:
    """Put ``results`` (the contents of results.json) into the order and the words of the report."""
    directions = results["directions"]
    columns = (*directions, AVERAGE) if len(directions) > 1 else tuple(directions)
    metrics = tuple(metric for metric in results["metrics"] if metric not in results["skipped"])
    systems = results["systems"]
    return View(
        results=results,
        columns=columns,
        metrics=metrics,
        rows=tuple(_row(results, name, columns, metrics) for name in systems),
        similarity={name: entry["similarity"] for name, entry in systems.items() if entry["similarity"] is not None},
        guards={
            direction: {name: _guard_cells(entry["guards"][direction]) for name, entry in systems.items()}
            for direction in directions
        },
        examples=tuple(most_different(data)),
    )


def _row(results: Mapping[str, Any], name: str, columns: tuple[str, ...], metrics: tuple[str, ...]) -> Row:
    return Row(
        system=name,
        cells={column: {metric: _cell(results, name, column, metric) for metric in metrics} for column in columns},
        is_baseline=name == results["baseline"],
        is_teacher=name == results["teacher"],
    )


def _cell(results: Mapping[str, Any], name: str, column: str, metric: str) -> Cell:
    scale = METRIC_SCALES[metric]
    everyone = {system: entry["scores"][column][metric] for system, entry in results["systems"].items()}
    value = everyone[name]
    if value is None:
        return Cell(None)
    baseline = results["baseline"]
    rivals = [score for system, score in everyone.items() if score is not None and system != results["teacher"]]
    best = len(rivals) > 1 and name != results["teacher"] and value == max(rivals)
    if baseline is None or name == baseline:
        return Cell(value * scale, best=best)
    difference = value - everyone[baseline]
    test = results["significance"][name].get(column, {}).get(metric, {})
    return Cell(
        value * scale,
        delta=difference * scale,
        significant=is_significant(test.get("p"), difference),
        best=best,
        p=test.get("p"),
    )


def _guard_cells(guards: Mapping[str, float | None]) -> dict[str, GuardCell]:
    return {name: _guard_cell(name, value) for name, value in guards.items()}


def _guard_cell(name: str, value: float | None) -> GuardCell:
    if value is None:
        return GuardCell("–", False)
    if name == "length_ratio":
        return GuardCell(f"{value:.2f}", not 0.8 <= value <= 1.25)
    return GuardCell(f"{100 * value:.1f} %", value > GUARD_LIMITS[name])
