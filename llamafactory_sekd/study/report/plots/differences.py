"""How far each system is from the baseline, with what the test leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamafactory_sekd.reporting.document import Plot
from llamafactory_sekd.reporting.figures import BASELINE, INK, Look, canvas, finish
from llamafactory_sekd.reporting.metric_labels import metric_label, metric_look
from llamafactory_sekd.study.report.cells import Group, Study, short_names
from llamafactory_sekd.study.report.paired import Difference
from llamafactory_sekd.study.report.plots.bars import MOST_BARS
from llamafactory_sekd.study.report.tables import Compare, last_column, mark_of, shown_metrics


def differences_plot(
    study: Study, groups: Sequence[Group], compare: Compare, looks: Mapping[str, Look]
) -> Plot | None:
    """Draw difference and 95 % interval of each system, and the difference of each pair of seeds as a dot.

    None without a difference, or with more systems than a plot can hold.
    """
    column, metrics = last_column(study), shown_metrics(study)
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
                    _draw(axes, place, difference, metric, looks[group.system].color)
            axes.axvline(0, color=BASELINE, linewidth=1.2)
            axes.set_yticks(range(len(compared)), [names[group] for group in compared], color=INK)
            axes.set_ylim(len(compared) - 0.4, -0.6)
            axes.grid(visible=False, axis="y")
            axes.set(xlabel=f"{metric_label(metric)}, difference ({column})")
            if axes is not panels[0]:
                axes.tick_params(labelleft=False)
        caption = (
            f"Difference to {study.baseline} with its 95 % interval over resampled sentences; small dots are pairs of "
            "seeds, filled marks are significant (†, ▾)."
        )
        return finish(figure, "differences", caption)


def _draw(axes: Any, place: int, difference: Difference, metric: str, color: str) -> None:
    scale = metric_look(metric).scale
    axes.plot([scale * difference.low, scale * difference.high], [place, place], color=color, linewidth=2.2)
    seeds = [scale * value for value in difference.seeds]
    axes.plot(seeds, [place + 0.24] * len(seeds), "o", markersize=3, color=color, alpha=0.6)
    fill = color if mark_of(difference, metric) else "white"
    axes.plot([scale * difference.value], [place], "o", markersize=7, color=color, markerfacecolor=fill)
