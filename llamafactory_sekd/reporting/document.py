"""What a report is made of, whatever its form: sections of paragraphs, tables, figures and passages of text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column of figures; columns that follow each other with the same ``group`` share a heading.

    The cells of a column that ``is_code`` hold signatures and the like, to be copied letter by letter.
    """

    name: str
    group: str = ""
    is_code: bool = False


@dataclass(frozen=True)
class Entry:
    """A figure in a table: ``text``, its ``spread`` (± …), a second line ``small``, and a ``mark`` (†, ▾).

    ``best`` sets it in bold, ``alarm`` asks for a look, ``hint`` is what hovering tells, ``bar`` (0 to 1) is drawn as
    the length of a bar where the form can.
    """

    text: str
    spread: str = ""
    mark: str = ""
    small: str = ""
    best: bool = False
    alarm: bool = False
    hint: str = ""
    bar: float | None = None


NOTHING = Entry("–")


@dataclass(frozen=True)
class Row:
    """A row: what it is about (one text per heading), its role (``baseline``, ``teacher`` or nothing), its figures."""

    names: tuple[str, ...]
    entries: tuple[Entry, ...]
    role: str = ""


@dataclass(frozen=True)
class Table:
    """``heads`` stand over the rows' names, ``columns`` over their figures; ``title`` is its caption.

    A ``folded`` table is opened by the reader, where the form can fold.
    """

    heads: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    title: str = ""
    folded: bool = False

    @property
    def marked(self) -> bool:
        """Tell whether any figure has a mark, so that the others leave room for one."""
        return any(entry.mark for row in self.rows for entry in row.entries)


@dataclass(frozen=True)
class Plot:
    """A figure as PNG and SVG (empty for a picture that was made elsewhere).

    ``name`` is its file's, ``caption`` also tells those who cannot see it.
    """

    name: str
    caption: str
    png: bytes
    svg: bytes


@dataclass(frozen=True)
class Span:
    """A piece of a line; ``marked`` is what a reader is to see first."""

    text: str
    marked: bool = False


@dataclass(frozen=True)
class Line:
    """A line of a passage: whose it is, a figure about it, its text; ``strong`` sets source and reference apart."""

    who: str
    spans: tuple[Span, ...]
    figure: str = ""
    strong: bool = False

    @property
    def is_empty(self) -> bool:
        """Tell whether there is nothing to read."""
        return not any(span.text for span in self.spans)


@dataclass(frozen=True)
class Passage:
    """Texts that are read together, such as a sentence and its translations."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Section:
    """``note`` says how the contents came about and precedes them; ``alarm`` is what a reader must not miss.

    ``main`` sections are also printed in the terminal and written as LaTeX.
    """

    title: str
    note: str = ""
    alarm: str = ""
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    lines: tuple[str, ...] = ()
    passages: tuple[Passage, ...] = ()
    main: bool = False


@dataclass(frozen=True)
class Document:
    """A complete report: its title, (name, value) facts below it, and its sections."""

    title: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
