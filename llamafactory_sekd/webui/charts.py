"""What the page draws and shows of results: the curves of a training, the report of an evaluation."""

from __future__ import annotations

import itertools
import json
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory_sekd.reporting.figures import Look, canvas, distinct_looks, draw_gate, draw_validation
from llamafactory_sekd.reporting.metric_labels import metric_label, metric_look


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def add_distillation_axes(figure: Figure, trainer_log: Sequence[Mapping[str, Any]]) -> None:
    """Draw hard share and mean difficulty below the loss, the NLL of a validation over it.

    A log without these metrics leaves the figure as it is.

    Args:
        figure: the host's figure, with one pair of axes.
        trainer_log: the records of ``trainer_log.jsonl``.
    """
    records = [record for record in trainer_log if "kd/hard_ratio" in record]
    if not records:
        return

    grid = figure.add_gridspec(2, 1)
    loss = figure.axes[0]
    loss.set_subplotspec(grid[0])
    figure.set_size_inches(4.8, 6.4)  # narrow, as its place in the page is, so that the letters stay legible
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.95))  # the page puts a label into the upper corner

    if nll := [(record["current_steps"], record["eval_kd/ce"]) for record in trainer_log if "eval_kd/ce" in record]:
        draw_validation(loss, nll)
    draw_gate(
        figure.add_subplot(grid[1], sharex=loss),
        [record["current_steps"] for record in records],
        [record["kd/hard_ratio"] for record in records],
        [record["kd/difficulty"] for record in records],
    )


def read_report(save_dir: Path) -> str | None:
    """``report.md``, None where there is none."""
    path = save_dir / "report.md"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def report_files(save_dir: Path) -> list[str]:
    """Return the files to offer as links; none where Gradio may not serve them, outside of the working directory."""
    folder = save_dir.resolve()
    if not any(folder.is_relative_to(root.resolve()) for root in (Path.cwd(), Path(tempfile.gettempdir()))):
        return []

    own = [folder / name for name in ("report.html", "report.md", "report.tex", "results.json")]
    beyond = [folder.parent / f"{folder.name}{suffix}" for suffix in (".yaml", ".log")]
    return [str(path) for path in (*own, *beyond) if path.is_file()]


def draw_report(save_dir: Path) -> Figure | None:
    """Draw every system's scores, one picture per metric, and the similarity to the teacher; None without results."""
    path = save_dir / "results.json"
    if not path.is_file():
        return None

    results = json.loads(path.read_text(encoding="utf-8"))
    tables = _tables(results)
    systems = dict(zip(results["systems"], itertools.cycle(distinct_looks()), strict=False))
    with canvas(len(tables), len(tables), height=3.4) as (figure, panels):
        figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.92))  # the page puts a label into the upper corner
        for axes, (title, table) in zip(panels, tables.items(), strict=True):
            _draw_bars(axes, title, table, systems)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


_Table = dict[str, dict[str, float | None]]


def _tables(results: dict[str, Any]) -> dict[str, _Table]:
    """Title to ``{system: {direction: value}}``, in the report's units."""
    tables: dict[str, _Table] = {}
    for metric in results["metrics"]:
        if metric in results["skipped"]:
            continue
        tables[metric_label(metric)] = {
            name: {
                direction: None
                if (value := system["scores"][direction][metric]) is None
                else value * metric_look(metric).scale
                for direction in results["directions"]
            }
            for name, system in results["systems"].items()
        }

    similarity = {name: system["similarity"] for name, system in results["systems"].items() if system["similarity"]}
    if similarity:
        tables["similarity to the teacher (BLEU)"] = {
            name: {direction: values[direction] for direction in results["directions"]}
            for name, values in similarity.items()
        }

    return tables


def _draw_bars(axes: Axes, title: str, table: _Table, systems: Mapping[str, Look]) -> None:
    directions = list(next(iter(table.values())))
    width = 0.8 / len(systems)
    for number, (system, look) in enumerate(systems.items()):
        if system not in table:
            continue
        places = [index - 0.4 + (number + 0.5) * width for index in range(len(directions))]
        heights = [value or 0.0 for value in table[system].values()]
        bars = axes.bar(places, heights, width, label=system, color=look.color)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)

    highest = max((value or 0.0 for values in table.values() for value in values.values()), default=0.0)
    axes.set_ylim(0, max(1.0, 1.12 * highest))
    axes.set_xticks(range(len(directions)), directions)
    axes.set_title(textwrap.fill(title, 22))
    axes.grid(visible=False, axis="x")
