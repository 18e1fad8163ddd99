"""A report's main tables in the terminal, or in the file or pipe that the output goes to."""

from __future__ import annotations

from dataclasses import replace

from rich.box import ASCII2, SIMPLE_HEAD
from rich.console import Console
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
    rich = RichTable(title=Text(table.title), title_justify="left", box=box, pad_edge=False)
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
