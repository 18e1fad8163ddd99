"""The main table in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llamafactory_sekd.evaluation.report.view import METRIC_LABELS, Cell, Row, View


def print_report(view: View, folder: Path) -> None:
    """Print the scores, what was skipped, and where the report is."""
    console = Console()
    # One column per metric and direction soon outgrows a terminal, so there is one table per metric.
    for metric in view.metrics:
        console.print(_table(view, metric))
    if any(cell.significant for row in view.rows for column in row.cells.values() for cell in column.values()):
        console.print(f"† significantly different from {view.results['baseline']} (p < 0.05)", style="dim")
    for metric, reason in view.results["skipped"].items():
        console.print(Text(f"{METRIC_LABELS[metric]} was skipped: {reason}", style="yellow"))
    console.print(Text(f"Report: {folder / 'report.html'}"))


def _table(view: View, metric: str) -> Table:
    table = Table(title=f"{METRIC_LABELS[metric]}, {view.results['task']}", title_justify="left")
    table.add_column("system", no_wrap=True)
    for column in view.columns:
        table.add_column(column, justify="right")
    for row in view.rows:
        table.add_row(_name(row), *(_score(row.cells[column][metric]) for column in view.columns))
    return table


def _name(row: Row) -> Text:
    roles = [role for role, holds in (("baseline", row.is_baseline), ("teacher", row.is_teacher)) if holds]
    return Text.assemble(row.system, (f"\n{', '.join(roles)}" if roles else "", "dim"))


def _score(cell: Cell) -> Text:
    style = "green" if (cell.delta or 0) > 0 else "red"
    return Text.assemble(
        (cell.text, "bold" if cell.best else ""),
        (f"\n{cell.delta_text}" if cell.delta is not None else "", style if cell.significant else "dim"),
    )
