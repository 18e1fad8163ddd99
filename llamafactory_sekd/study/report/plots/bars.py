"""Horizontal bars with names, mean ± sd, and a dot for each seed: the paper's Fig. 3 and 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.reporting.document import Plot
from llamafactory_sekd.reporting.figures import INK, SOFT, Look, canvas, finish
from llamafactory_sekd.reporting.metric_labels import metric_label, metric_look
from llamafactory_sekd.study.report.cells import Group, Study, short_names, summarize
from llamafactory_sekd.study.report.tables import entry, last_column, shown_metrics


# More of them are a table's business.
MOST_BARS = 14


def similarity_plot(study: Study, groups: Sequence[Group], looks: Mapping[str, Look]) -> Plot | None:
    """Draw BLEU with the teacher's translations as references (Fig. 4); None where there are none, or too many."""
    column = last_column(study)
    values = {
        group: [(cell["similarity"] or {}).get(column) for cell in group.cells.values()]
        for group in (*groups, *study.models)
        if group.system != study.teacher
    }
    kept = {group: known for group, seeds in values.items() if (known := [one for one in seeds if one is not None])}
    if not kept or len(kept) > MOST_BARS:
        return None
    with canvas(height=_height(len(kept))) as (figure, (axes,)):
        _bars(axes, kept, looks)
        axes.set(xlabel=f"BLEU against the teacher's translations, {column}")
        caption = f"How like the teacher's each system's translations are ({column}); dots are seeds."
        return finish(figure, "similarity", caption)


def progressive_plot(study: Study, groups: Sequence[Group], looks: Mapping[str, Look]) -> Plot | None:
    """Draw the systems with a moving β next to those with the same objective and a fixed one (Fig. 3)."""
    moving = {group.objective for group in groups if _moves(group)}
    shown = [group for group in groups if group.objective in moving]
    if all(map(_moves, shown)):
        return None
    metrics, column = shown_metrics(study), last_column(study)
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
            _bars(axes, values, looks, {group: _strategy(group) for group in shown})
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
