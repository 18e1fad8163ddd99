"""What a report is made of, whatever its form: sections of paragraphs, tables and figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column of figures; columns that follow each other with the same ``group`` share a heading."""

    name: str
    group: str = ""


@dataclass(frozen=True)
class Entry:
    """A figure in a table: ``text``, its ``spread`` (± …), a ``mark`` (†), a second line ``small``.

    ``best`` sets it in bold, ``alarm`` asks for a look, ``hint`` is what hovering tells.
    """

    text: str
    spread: str = ""
    mark: str = ""
    small: str = ""
    best: bool = False
    alarm: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Row:
    """A row: what it is about (one text per heading), its role (``baseline``, ``teacher`` or nothing), its figures."""

    names: tuple[str, ...]
    entries: tuple[Entry, ...]
    role: str = ""


@dataclass(frozen=True)
class Table:
    """``heads`` stand over the rows' names, ``columns`` over their figures."""

    heads: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def marked(self) -> bool:
        """Tell whether any figure has a mark, so that the others leave room for one."""
        return any(entry.mark for row in self.rows for entry in row.entries)


@dataclass(frozen=True)
class Plot:
    """A figure as PNG and SVG; ``name`` is its file's, ``caption`` also tells those who cannot see it."""

    name: str
    caption: str
    png: bytes
    svg: bytes


@dataclass(frozen=True)
class Section:
    """``note`` says how the contents came about, and stands before them; ``alarm`` what a reader must not miss."""

    title: str
    note: str = ""
    alarm: str = ""
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """A report: its title, facts at the top, and sections."""

    title: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
