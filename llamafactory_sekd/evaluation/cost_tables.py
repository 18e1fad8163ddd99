"""What each model takes, and its quality against its size."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from llamafactory_sekd.evaluation.score_cells import columns_of, row_of, score_entry, shown_metrics
from llamafactory_sekd.reporting.document import NOTHING, Column, Entry, Plot, Section, Table
from llamafactory_sekd.reporting.figures import INK, canvas, distinct_looks, finish
from llamafactory_sekd.reporting.metric_labels import metric_label, metric_look


def costs_section(results: Mapping[str, Any]) -> Section | None:
    """Show what each model takes, and its quality against its size."""
    found = {name: entry["cost"] for name, entry in results["systems"].items() if entry["cost"]}
    if not found:
        return None
    column = columns_of(results)[-1]
    metrics = shown_metrics(results)[-1:]  # the last one is a model's, where there is one
    rows = tuple(
        row_of(
            results,
            name,
            [
                *(score_entry(results, name, column, metric) for metric in metrics),
                _amount(cost["parameters"], 1e6),
                _amount(cost["disk_bytes"], 1e9),
                _amount(cost["sentences_per_second"], 1),
                _amount(cost["peak_memory"], 1e9),
            ],
        )
        for name, cost in found.items()
    )
    names = ("parameters (M)", "on disk (GB)", "sentences/s", "GPU memory (GB)")
    columns = (*(Column(f"{metric_label(metric)}, {column}") for metric in metrics), *map(Column, names))
    plots = tuple(plot for metric in metrics if (plot := _cost_plot(results, found, metric, column)) is not None)
    note = (
        "Parameters and bytes are those of the model's files, adapters included; speed is over all directions and "
        "processes, and memory the most that one GPU had to hold, as this run measured them."
    )
    return Section("Quality and cost", note, tables=(Table(("system",), columns, rows),), plots=plots)


def _amount(value: float | None, unit: float) -> Entry:
    return (
        NOTHING if value is None else Entry(f"{value / unit:,.3g}" if value / unit < 1000 else f"{value / unit:,.0f}")
    )


def _cost_plot(
    results: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]], metric: str, column: str
) -> Plot | None:
    """Draw a metric against the parameters; None where fewer than two systems have both."""
    look = metric_look(metric)
    points = {
        name: (cost["parameters"] / 1e6, results["systems"][name]["scores"][column][metric] * look.scale)
        for name, cost in found.items()
        if cost["parameters"] and results["systems"][name]["scores"][column][metric] is not None
    }
    if len(points) < 2:
        return None
    with canvas(height=3.4) as (figure, (axes,)):
        for (name, (size, score)), how in zip(points.items(), itertools.cycle(distinct_looks()), strict=False):
            axes.plot([size], [score], how.marker, color=how.color, markersize=8)
            axes.annotate(name, (size, score), (8, 4), textcoords="offset points", color=INK, fontsize=9.5)
        axes.set_xscale("log")
        axes.margins(x=0.25, y=0.2)
        axes.set(xlabel="parameters (millions)", ylabel=f"{metric_label(metric)}, {column}", title="Quality and size")
        return finish(figure, "cost", f"{metric_label(metric)} ({column}) against the number of parameters.")
