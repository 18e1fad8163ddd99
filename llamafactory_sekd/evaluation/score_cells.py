"""The cells of an evaluation's tables: scores with interval, difference and mark, by the contents of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamafactory_sekd.evaluation.significance import is_significant
from llamafactory_sekd.reporting.document import NOTHING, Entry, Row
from llamafactory_sekd.reporting.metric_labels import (
    AVERAGE,
    MetricLook,
    best_of,
    metric_look,
    number,
    significance_mark,
)


def columns_of(results: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the directions and, where there are several, the average."""
    directions = tuple(results["directions"])
    return (*directions, AVERAGE) if len(directions) > 1 else directions


def shown_metrics(results: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the metrics that were computed."""
    return tuple(metric for metric in results["metrics"] if metric not in results["skipped"])


def row_of(results: Mapping[str, Any], name: str, entries: Sequence[Entry], *names: str) -> Row:
    """Return a system's row with its role."""
    roles = [role for role in ("baseline", "teacher") if name == results[role]]
    return Row((name, *names), tuple(entries), " ".join(roles))


def score_entry(results: Mapping[str, Any], name: str, column: str, metric: str) -> Entry:
    """Return a score with its interval, its difference to the baseline and the mark of the test.

    The teacher takes no part in the best of a column, for it nearly always wins.
    """
    look = metric_look(metric)
    everyone = {system: entry["scores"][column][metric] for system, entry in results["systems"].items()}
    value, baseline = everyone[name], results["baseline"]
    if value is None:
        return NOTHING
    rivals = [score for system, score in everyone.items() if score is not None and system != results["teacher"]]
    best = len(rivals) > 1 and name != results["teacher"] and value == best_of(metric, rivals)
    test = results["significance"].get(name, {}).get(column, {}).get(metric, {})
    spread = number(test["ci"] * look.scale, look.digits) if test.get("ci") is not None else ""
    shown = number(value * look.scale, look.digits)
    if baseline is None or name == baseline or everyone[baseline] is None:
        return Entry(shown, spread, best=best)
    difference = value - everyone[baseline]
    significant = is_significant(test.get("p_holm"), test.get("low"), test.get("high"))
    return Entry(
        shown,
        spread,
        mark=significance_mark(metric, difference, significant, look.digits),
        small=number(difference * look.scale, look.digits, sign=True),
        best=best,
        hint=hint_of(test, look),
    )


def hint_of(test: Mapping[str, Any], look: MetricLook) -> str:
    """Return what hovering over a score tells of its test."""
    if test.get("p") is None:
        return ""
    low, high = (number(test[end] * look.scale, 2) for end in ("low", "high"))
    return f"95 % interval of the difference {low} to {high}, p = {test['p']:.4f}, corrected {test['p_holm']:.4f}"


def plain_entry(value: float, metric: str) -> Entry:
    """Return a score alone, as its metric is shown."""
    look = metric_look(metric)
    return Entry(number(value * look.scale, look.digits))
