"""Scores over a key of the matrix (the paper's Fig. 2 and 5), and how a key's best value was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamafactory_sekd.reporting.document import Plot
from llamafactory_sekd.reporting.figures import Look, canvas, finish, name_below
from llamafactory_sekd.reporting.metric_labels import metric_label, metric_look
from llamafactory_sekd.study.report.best_values import Choice
from llamafactory_sekd.study.report.cells import Group, Study, Summary, is_number, shown, symbol
from llamafactory_sekd.study.report.tables import last_column, shown_metrics


def over_key(study: Study, groups: Sequence[Group], key: str, looks: Mapping[str, Look]) -> Plot | None:
    """Draw a score over the numbers of ``key``: a line per system, its sd over seeds as a band.

    Systems on which the key has no effect and values that are no numbers (``auto``) are horizontal lines; the teacher,
    next to which all else would look small, is left to the tables. None where no system has two numbers.
    """
    metrics, column = shown_metrics(study), last_column(study)
    by_system: dict[str, list[Group]] = {}
    for group in groups:
        if is_number(group.value(key)):
            by_system.setdefault(group.system, []).append(group)
    curves = {
        system: sorted(own, key=lambda group: group.value(key)) for system, own in by_system.items() if len(own) > 1
    }
    if not curves or not metrics:
        return None
    levels = [group for group in groups if group.system not in curves or not is_number(group.value(key))]

    with canvas(len(metrics), height=3.6) as (figure, panels):
        for axes, metric in zip(panels, metrics, strict=True):
            for system, own in curves.items():
                points = [(group.value(key), group.scores(column, metric)) for group in own]
                _curve(axes, points, metric_look(metric).scale, looks[system])
            for group in levels:
                _level(axes, group.scores(column, metric), metric_look(metric).scale, looks[group.system])
            values = sorted({group.value(key) for own in curves.values() for group in own})
            axes.set(xlabel=axis_name(key), ylabel=f"{metric_label(metric)}, {column}")
            place_values(axes, values)
        drawn = {system: looks[system] for system in curves}
        name_below(figure, drawn | {group.name(): _level_look(looks[group.system]) for group in levels})
        names = " and ".join(metric_label(metric) for metric in metrics)
        caption = f"{names} over {axis_name(key)}, {column}; mean over seeds, the band is ± one standard deviation."
        return finish(figure, f"over_{key}", caption)


def _curve(axes: Any, points: Sequence[tuple[float, Summary | None]], scale: float, look: Look) -> None:
    known = [(x, summary) for x, summary in points if summary is not None]
    if not known:
        return
    xs = [x for x, _ in known]
    means = [scale * summary.mean for _, summary in known]
    spread = [scale * (summary.sd or 0.0) for _, summary in known]
    axes.plot(xs, means, color=look.color, marker=look.marker, linestyle=look.line)
    low, high = zip(*((mean - sd, mean + sd) for mean, sd in zip(means, spread, strict=True)), strict=True)
    axes.fill_between(xs, low, high, color=look.color, alpha=0.13, linewidth=0)


def _level(axes: Any, summary: Summary | None, scale: float, look: Look) -> None:
    if summary is not None:
        axes.axhline(scale * summary.mean, color=look.color, linestyle=_level_look(look).line, linewidth=1.3)


def _level_look(look: Look) -> Look:
    return Look(look.color, "", (0, (4, 2.5)))


def selection_plot(study: Study, chosen: Sequence[Choice], looks: Mapping[str, Look]) -> Plot | None:
    """Draw the validation metric over the selected key, a ring around each system's best value."""
    numbers = [
        choice for choice in chosen if len(choice.tried) > 1 and all(is_number(value) for value, _ in choice.tried)
    ]
    if not numbers:
        return None
    key, metric = numbers[0].key, study.results["selection"][0]["metric"]
    with canvas(height=3.6) as (figure, (axes,)):
        drawn: dict[str, Look] = {}
        for choice in numbers:
            look, tried = looks[choice.group.system], sorted(choice.tried)
            axes.plot(*zip(*tried, strict=True), color=look.color, marker=look.marker, linestyle=look.line)
            best = dict(tried)[choice.value]
            axes.plot([choice.value], [best], "o", markersize=12, markerfacecolor="none", color=look.color)
            drawn[choice.group.name(without=[key])] = look
        axes.set(xlabel=axis_name(key), ylabel=f"{metric} (validation)")
        place_values(axes, sorted({value for choice in numbers for value, _ in choice.tried}))
        name_below(figure, drawn)
        caption = f"Validation {metric} over {axis_name(key)}, mean over seeds; the ring is each system's best value."
        return finish(figure, f"selection_{key}", caption)


def axis_name(key: str) -> str:
    """Return the label of a key's axis: its symbol, then its name."""
    return key if symbol(key) == key else f"{symbol(key)} ({key})"


def place_values(axes: Any, values: Sequence[float]) -> None:
    """Put the ticks at the values that were tried; on a logarithmic axis where they span more than a power of ten."""
    if min(values) > 0 and max(values) / min(values) > 12:
        axes.set_xscale("log")
    axes.set_xticks(values, [shown(value) for value in values])
    axes.minorticks_off()
