"""What a terminal, or a log file, shows: the main tables of a report, and bars while something takes long."""

from __future__ import annotations

import time
from dataclasses import replace

from rich.box import ASCII2, SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table as RichTable
from rich.text import Text

from llamafactory_sekd.reporting.document import Document, Entry, Row, Table
from llamafactory_sekd.reporting.metric_labels import BETTER


# Nothing is wrapped or cut in a file: whoever reads it chooses the width.
_PIPE_WIDTH = 1000


def print_document(document: Document, console: Console | None = None, notes: bool = False) -> None:
    """Print the alarms and tables of the main sections.

    Args:
        document: what to print.
        console: where to; standard output by default.
        notes: whether the sections' notes are printed too.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, _PIPE_WIDTH))
    for section in document.sections:
        if not section.main:
            continue
        for table in section.tables:
            for one in _narrow(table, section.title):
                console.print(Text(one.title, style="italic"), soft_wrap=True)  # as a table's title it has its width
                console.print(_rich(one, console.is_terminal))
        if notes and section.note:
            console.print(Text(section.note, style="dim"))
        if section.alarm:
            console.print(Text(section.alarm, style="yellow"))


def _narrow(table: Table, title: str) -> list[Table]:
    """Split a table with grouped columns by the columns' names: metrics times directions outgrow any terminal.

    A table without a title has the section's, which is ``title``.
    """
    names = dict.fromkeys(column.name for column in table.columns)
    title = table.title or title
    if not any(column.group for column in table.columns):
        return [replace(table, title=title)]
    tables = []
    for name in names:
        kept = [index for index, column in enumerate(table.columns) if column.name == name]
        columns = tuple(type(table.columns[i])(table.columns[i].group) for i in kept)
        rows = tuple(Row(row.names, tuple(row.entries[i] for i in kept), row.role) for row in table.rows)
        tables.append(Table(table.heads, columns, rows, f"{name}, {title}"))
    return tables


def _rich(table: Table, is_terminal: bool) -> RichTable:
    box = SIMPLE_HEAD if is_terminal else ASCII2
    rich = RichTable(box=box, pad_edge=False)
    for head in table.heads:
        rich.add_column(Text(head), no_wrap=True)
    for column in table.columns:
        rich.add_column(Text(column.name), justify="left" if column.is_code else "right")
    for row in table.rows:
        first, *others = row.names
        role = f" ({row.role})" if row.role else ""
        rich.add_row(Text.assemble(first, (role, "dim")), *map(Text, others), *map(_entry, row.entries))
    return rich


def _entry(entry: Entry) -> Text:
    style = "dim" if not entry.mark else "green" if entry.mark == BETTER else "red"
    return Text.assemble(
        (entry.text, "bold" if entry.best else "yellow" if entry.alarm else ""),
        (f" ± {entry.spread}" if entry.spread else "", "dim"),
        (f" ({entry.small}{entry.mark})" if entry.small else entry.mark, style),
    )


class ProgressView:
    """Bars with a name, a share and a note, and lines above them; in a log file, a line now and then.

    Args:
        console: where to.
        bar_width: columns of a bar.
        line_every: seconds between two lines where there is no terminal.
    """

    def __init__(self, console: Console, bar_width: int, line_every: float) -> None:
        self.console = console
        self._line_every = line_every
        self._last_line = time.monotonic()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=bar_width),
            TaskProgressColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def say(self, line: str, style: str = "") -> None:
        """Print a line above the bars."""
        self.console.print(escape(line), style=style, highlight=False, soft_wrap=True)

    def begin(self, what: str) -> None:
        """Say what has begun, where no bar shows it."""
        if not self.console.is_terminal:
            self.say(f"… {what}")

    def line_is_due(self) -> bool:
        """Tell whether a line about how far it is should be printed now, and count it as printed."""
        if self.console.is_terminal or time.monotonic() - self._last_line < self._line_every:
            return False
        self._last_line = time.monotonic()
        return True


def show_seconds(seconds: float) -> str:
    """Return a duration as people say it: ``45 s``, ``3 min 20 s``, ``35 min``, ``2 h 10 min``."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    # Nobody plans by the second what takes minutes, nor by the ten seconds what takes longer.
    minutes, rest = divmod(round(seconds, -1), 60)
    if minutes < 10 and rest:
        return f"{minutes:.0f} min {rest:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
