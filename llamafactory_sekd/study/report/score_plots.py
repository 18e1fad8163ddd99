"""Plots of scores: bars and differences of systems (the paper's Fig. 3 and 4), curves over a key (Fig. 2 and 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.reporting.document import Plot
from llamafactory_sekd.reporting.figures import BASELINE, INK, SOFT, Look, canvas, draw_band, finish, name_below
from llamafactory_sekd.reporting.metric_labels import metric_label, metric_look
from llamafactory_sekd.study.report.cells import (
    Difference,
    Group,
    is_number,
    short_names,
    shown,
    summarize,
    symbol,
)
from llamafactory_sekd.study.report.views import Compare, Views, entry, mark_of


# More of them are a table's business.
MOST_BARS = 14


def similarity_plot(views: Views) -> Plot | None:
    """Draw BLEU with the teacher's translations as references (Fig. 4); None where there are none, or too many."""
    study = views.study
    column = study.last_column
    values = {
        group: [(cell["similarity"] or {}).get(column) for cell in group.cells.values()]
        for group in (*views.groups, *study.models)
        if group.system != study.teacher
    }
    kept = {group: known for group, seeds in values.items() if (known := [one for one in seeds if one is not None])}
    if not kept or len(kept) > MOST_BARS:
        return None
    with canvas(height=_height(len(kept))) as (figure, (axes,)):
        _bars(axes, kept, views.looks)
        axes.set(xlabel=f"BLEU against the teacher's translations, {column}")
        caption = f"How like the teacher's each system's translations are ({column}); dots are seeds."
        return finish(figure, "similarity", caption)


def progressive_plot(views: Views) -> Plot | None:
    """Draw the systems with a moving β next to those with the same objective and a fixed one (Fig. 3)."""
    moving = {group.objective for group in views.groups if _moves(group)}
    shown = [group for group in views.groups if group.objective in moving]
    if all(map(_moves, shown)):
        return None
    metrics, column = views.study.shown_metrics, views.study.last_column
    shown.sort(key=lambda group: (str(group.objective), _moves(group)))
    with canvas(len(metrics), height=_height(len(shown))) as (figure, panels):
        for axes, metric in zip(panels, metrics, strict=True):
            values = {
                group: [
                    metric_look(metric).scale * score
                    for cell in group.cells.values()
                    if (score := cell["scores"][column][metric]) is not None
                ]
                for group in shown
            }
            _bars(axes, values, views.looks, {group: _strategy(group) for group in shown})
            axes.set(xlabel=f"{metric_label(metric)}, {column}")
        caption = f"Progressive against fixed β ({column}); mean ± standard deviation, dots are seeds."
        return finish(figure, "progressive", caption)


def _bars(
    axes: Any,
    values: Mapping[Group, Sequence[float]],
    looks: Mapping[str, Look],
    notes: Mapping[Group, str] | None = None,
) -> None:
    """Draw a bar per group from zero, the first on top."""
    short = short_names(list(values))
    names = [short[group] + (f"\n{notes[group]}" if notes else "") for group in values]
    for place, (group, seeds) in enumerate(values.items()):
        summary, color = summarize(seeds), looks[group.system].color
        if summary is None:
            continue
        axes.barh(place, summary.mean, color=color, alpha=0.75, height=0.62)
        axes.errorbar(summary.mean, place, xerr=summary.sd or 0.0, color=INK, capsize=3, linewidth=1.1)
        if len(seeds) > 1:
            axes.plot(seeds, [place] * len(seeds), "o", markersize=3.5, color="white", markeredgecolor=INK)
        text = entry(summary, 1)
        label = f"{text.text} ± {text.spread}" if text.spread else text.text
        end = max([summary.mean + (summary.sd or 0.0), *seeds])
        axes.annotate(label, (end, place), (6, 0), textcoords="offset points", va="center", color=SOFT, fontsize=9.5)
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.16)
    axes.grid(visible=False, axis="y")


def _height(bars: int) -> float:
    return 0.9 + 0.42 * bars


def _moves(group: Group) -> bool:
    return group.objective is not None and group.config.get("kd_beta_end") is not None


def _strategy(group: Group) -> str:
    start = group.config.get("kd_beta", DistillationArguments.kd_beta)
    return f"β {start} → {group.config['kd_beta_end']}" if _moves(group) else f"β {start}"


def differences_plot(views: Views, groups: Sequence[Group], compare: Compare) -> Plot | None:
    """Draw difference and 95 % interval of each system, and the difference of each pair of seeds as a dot.

    None without a difference, or with more systems than a plot can hold.
    """
    column, metrics = views.study.last_column, views.study.shown_metrics
    found = {metric: {group: compare(group, column, metric) for group in groups} for metric in metrics}
    compared = [group for group in groups if any(found[metric][group] for metric in metrics)]
    if not compared or len(compared) > MOST_BARS:
        return None
    names = short_names(groups)
    with canvas(len(metrics), columns=len(metrics), height=0.9 + 0.36 * len(compared)) as (figure, panels):
        for axes, metric in zip(panels, metrics, strict=True):
            for place, group in enumerate(compared):
                difference = found[metric][group]
                if difference is not None:
                    _draw_difference(axes, place, difference, metric, views.looks[group.system].color)
            axes.axvline(0, color=BASELINE, linewidth=1.2)
            axes.set_yticks(range(len(compared)), [names[group] for group in compared], color=INK)
            axes.set_ylim(len(compared) - 0.4, -0.6)
            axes.grid(visible=False, axis="y")
            axes.set(xlabel=f"{metric_label(metric)}, difference ({column})")
            if axes is not panels[0]:
                axes.tick_params(labelleft=False)
        caption = (
            f"Difference to {views.study.baseline} with its 95 % interval over resampled sentences; small dots are "
            "pairs of seeds, filled marks are significant (†, ▾)."
        )
        return finish(figure, "differences", caption)


def _draw_difference(axes: Any, place: int, difference: Difference, metric: str, color: str) -> None:
    scale = metric_look(metric).scale
    axes.plot([scale * difference.low, scale * difference.high], [place, place], color=color, linewidth=2.2)
    seeds = [scale * value for value in difference.seeds]
    axes.plot(seeds, [place + 0.24] * len(seeds), "o", markersize=3, color=color, alpha=0.6)
    fill = color if mark_of(difference, metric) else "white"
    axes.plot([scale * difference.value], [place], "o", markersize=7, color=color, markerfacecolor=fill)


def over_key(views: Views, key: str) -> Plot | None:
    """Draw a score over the numbers of ``key``: a line per system, its sd over seeds as a band.

    Systems on which the key has no effect and values that are no numbers (``auto``) are horizontal lines; the teacher,
    next to which all else would look small, is left to the tables. None where no system has two numbers.
    """
    metrics, column, looks = views.study.shown_metrics, views.study.last_column, views.looks
    by_system: dict[str, list[Group]] = {}
    for group in views.groups:
        if is_number(group.value(key)):
            by_system.setdefault(group.system, []).append(group)
    curves = {
        system: sorted(own, key=lambda group: group.value(key)) for system, own in by_system.items() if len(own) > 1
    }
    if not curves or not metrics:
        return None
    levels = [group for group in views.groups if group.system not in curves or not is_number(group.value(key))]

    with canvas(len(metrics), height=3.6) as (figure, panels):
        for axes, metric in zip(panels, metrics, strict=True):
            scale = metric_look(metric).scale
            for system, own in curves.items():
                points = [
                    (group.value(key), one) for group in own if (one := group.scores(column, metric)) is not None
                ]
                means, spread = (
                    [scale * one.mean for _, one in points],
                    [scale * (one.sd or 0.0) for _, one in points],
                )
                if points:
                    draw_band(axes, [x for x, _ in points], means, spread, looks[system])
            for group in levels:
                summary, look = group.scores(column, metric), _level_look(looks[group.system])
                if summary is not None:
                    axes.axhline(scale * summary.mean, color=look.color, linestyle=look.line, linewidth=1.3)
            values = sorted({group.value(key) for own in curves.values() for group in own})
            axes.set(xlabel=_axis_name(key), ylabel=f"{metric_label(metric)}, {column}")
            _place_values(axes, values)
        drawn = {system: looks[system] for system in curves}
        name_below(figure, drawn | {group.name(): _level_look(looks[group.system]) for group in levels})
        names = " and ".join(metric_label(metric) for metric in metrics)
        caption = f"{names} over {_axis_name(key)}, {column}; mean over seeds, the band is ± one standard deviation."
        return finish(figure, f"over_{key}", caption)


def _level_look(look: Look) -> Look:
    return Look(look.color, "", (0, (4, 2.5)))


def selection_plot(views: Views) -> Plot | None:
    """Draw the validation metric over the selected key, a ring around each system's best value."""
    numbers = [
        choice
        for choice in views.chosen
        if len(choice.tried) > 1 and all(is_number(value) for value, _ in choice.tried)
    ]
    if not numbers:
        return None
    key, metric = numbers[0].key, views.study.results["selection"][0]["metric"]
    with canvas(height=3.6) as (figure, (axes,)):
        drawn: dict[str, Look] = {}
        for choice in numbers:
            look, tried = views.looks[choice.group.system], sorted(choice.tried)
            axes.plot(*zip(*tried, strict=True), color=look.color, marker=look.marker, linestyle=look.line)
            best = dict(tried)[choice.value]
            axes.plot([choice.value], [best], "o", markersize=12, markerfacecolor="none", color=look.color)
            drawn[choice.group.name(without=[key])] = look
        axes.set(xlabel=_axis_name(key), ylabel=f"{metric} (validation)")
        _place_values(axes, sorted({value for choice in numbers for value, _ in choice.tried}))
        name_below(figure, drawn)
        caption = f"Validation {metric} over {_axis_name(key)}, mean over seeds; the ring is each system's best value."
        return finish(figure, f"selection_{key}", caption)


def _axis_name(key: str) -> str:
    """Return the label of a key's axis: its symbol, then its name."""
    return key if symbol(key) == key else f"{symbol(key)} ({key})"


def _place_values(axes: Any, values: Sequence[float]) -> None:
    """Put the ticks at the values that were tried; on a logarithmic axis where they span more than a power of ten."""
    if min(values) > 0 and max(values) / min(values) > 12:
        axes.set_xscale("log")
    axes.set_xticks(values, [shown(value) for value in values])
    axes.minorticks_off()
