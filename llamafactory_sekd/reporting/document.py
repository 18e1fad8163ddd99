"""A report of sections, tables, figures and passages, and its forms: Markdown, HTML, LaTeX."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from llamafactory_sekd.files import write_atomic


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


def write_document(document: Document, folder: Path) -> list[Path]:
    """Write a report in all its forms into ``folder``; return what was written, the reports first."""
    files = {
        folder / "report.md": render_markdown(document).encode("utf-8"),
        folder / "report.html": render_html(document).encode("utf-8"),
        folder / "report.tex": render_latex(document).encode("utf-8"),
    }
    for section in document.sections:
        for plot in section.plots:
            files[folder / "plots" / f"{plot.name}.png"] = plot.png
            files[folder / "plots" / f"{plot.name}.svg"] = plot.svg
    for path, content in files.items():
        write_atomic(path, content)
    return list(files)


# What Markdown and the HTML inside it would act on.
_MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]#|~"} | {"<": "&lt;", "&": "&amp;"})


def escape_markdown(text: str) -> str:
    """Return ``text`` so that Markdown shows it as it is."""
    return text.translate(_MARKDOWN)


def render_markdown(document: Document) -> str:
    """Return the report as GitHub-flavoured Markdown, with its plots as files in ``plots/``."""
    facts = "; ".join(f"{escape_markdown(name)} {escape_markdown(value)}" for name, value in document.facts)
    parts = [f"# {escape_markdown(document.title)}", facts]
    for section in document.sections:
        parts += _markdown_section(section)
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_section(section: Section) -> list[str]:
    parts = [f"## {escape_markdown(section.title)}"]
    if section.alarm:
        parts.append(f"**{escape_markdown(section.alarm)}**")
    parts.append(escape_markdown(section.note))
    parts += [_markdown_table(one) for one in section.tables]
    parts += [
        f"![{escape_markdown(plot.caption)}](plots/{plot.name}.png)\n\n*{escape_markdown(plot.caption)}*"
        for plot in section.plots
    ]
    parts += [_markdown_passage(passage) for passage in section.passages]
    if section.lines:
        parts.append("\n".join(f"- {escape_markdown(line)}" for line in section.lines))
    return parts


def _markdown_table(one: Table) -> str:
    title = f"**{escape_markdown(one.title)}**\n\n" if one.title else ""
    if all(column.is_code for column in one.columns):
        # In a table, the strokes of a signature would have to be escaped, and could not be copied.
        rows = (
            f"- {escape_markdown(' '.join(row.names))}: `{', '.join(entry.text for entry in row.entries)}`"
            for row in one.rows
        )
        return title + "\n".join(rows)
    head = [
        *map(escape_markdown, one.heads),
        *(escape_markdown(f"{column.group} {column.name}".strip()) for column in one.columns),
    ]
    rule = ["---"] * len(one.heads) + ["---:"] * len(one.columns)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, rule, *map(_markdown_row, one.rows))]
    return title + "\n".join(lines)


def _markdown_row(row: Row) -> list[str]:
    first, *others = map(escape_markdown, row.names)
    role = f" *({row.role})*" if row.role else ""
    return [first + role, *others, *map(_markdown_entry, row.entries)]


def _markdown_entry(entry: Entry) -> str:
    value = escape_markdown(entry.text)
    if entry.best or entry.alarm:
        value = f"**{value}**"
    value += f" ± {entry.spread}" if entry.spread else ""
    return value + entry.mark + (f" ({escape_markdown(entry.small)})" if entry.small else "")


def _markdown_passage(passage: Passage) -> str:
    return "\n".join([f"**{escape_markdown(passage.title)}**", "", *map(_markdown_line, passage.lines)])


def _markdown_line(line: Line) -> str:
    figure = f" ({escape_markdown(line.figure)})" if line.figure else ""
    text = "".join(
        f"**{escape_markdown(span.text)}**" if span.marked else escape_markdown(span.text) for span in line.spans
    )
    return f"- {escape_markdown(line.who)}{figure}: {text or '*empty*'}"


def render_html(document: Document) -> str:
    """Return the complete report with its plots inside: one file, no script, nothing loaded from elsewhere.

    Every text is escaped, translations above all: they may hold anything. Images cannot run anything.
    """
    environment = Environment(
        loader=PackageLoader("llamafactory_sekd.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("document.html.j2")
    return template.render(document=document, groups=_column_groups, image=_image)


def _column_groups(table: Table) -> list[tuple[str, int]]:
    """Return the headings over the columns with the number of columns below each; none where no column has one."""
    groups = [(name, len(list(columns))) for name, columns in groupby(column.group for column in table.columns)]
    return groups if any(name for name, _ in groups) else []


def _image(plot: Plot) -> str:
    kind, content = ("svg+xml", plot.svg) if plot.svg else ("png", plot.png)
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


# Hyphens that are followed by another one: LaTeX would make a dash of them.
_HYPHEN = "\x00"
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    # At the start of a row, TeX takes [ and * for options of the \\ before; babel has shorthands that begin with ".
    | {character: f"{{{character}}}" for character in "[]*"}
    | {
        _HYPHEN: "-{}",
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "`": r"\textasciigrave{}",
        '"': r"{\char34}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "†": r"\textsuperscript{$\dagger$}",
        "▾": r"\textsuperscript{$\triangledown$}",
        "–": "--",
        "—": "---",
        "‘": "`",
        "’": "'",
        "“": "``",
        "”": "''",
        "…": r"\dots{}",
    }
    | {
        character: f"${code}$"
        for character, code in {
            "−": "-",
            "±": r"\pm",
            "×": r"\times",
            "·": r"\cdot",
            "≤": r"\leq",
            "≥": r"\geq",
            "‖": r"\Vert",
            "→": r"\rightarrow",
            "↓": r"\downarrow",
            "↑": r"\uparrow",
            "α": r"\alpha",
            "β": r"\beta",
            "γ": r"\gamma",
            "Γ": r"\Gamma",
            "Δ": r"\Delta",
            "λ": r"\lambda",
            "τ": r"\tau",
        }.items()
    }
)
# Letters of Latin-1 and of Latin Extended-A, which LaTeX knows in the encoding T1.
_LATIN = re.compile(r"[À-ÖØ-öø-ſ]")


def escape_latex(text: str) -> str:
    """Return ``text`` so that LaTeX prints it as it is, on one line."""
    return re.sub(r"-(?=-)", _HYPHEN, re.sub(r"\s+", " ", text)).translate(_LATEX)


def render_latex(document: Document) -> str:
    """Return the tables of the main sections as ``table`` environments to be included in a paper.

    The first lines say what the paper's preamble needs for them.
    """
    lines = []
    for section in document.sections:
        if section.main:
            for table in section.tables:
                title = section.title if not table.title or table.title in document.title else table.title
                lines += ["", *_latex_table(table, f"{document.title}. {title}. {section.note}")]
    return "\n".join([*_latex_needs("\n".join(lines)), *lines]) + "\n"


def _latex_needs(tables: str) -> Iterator[str]:
    others = [character for character in dict.fromkeys(tables) if not character.isascii()]
    latin = [character for character in others if _LATIN.match(character)]
    encoding = r" and \usepackage[T1]{fontenc}" if latin else ""
    yield rf"% Needs \usepackage{{booktabs}} and \usepackage{{amssymb}}{encoding}."
    foreign = "".join(character for character in others if character not in latin)
    if foreign:
        yield f"% Characters beyond Latin: {foreign[:60]}"
        yield r"% XeLaTeX and LuaLaTeX print them with a font that has them. pdfLaTeX needs a package, for Chinese"
        yield r"% \usepackage{CJKutf8} and the tables between \begin{CJK*}{UTF8}{gbsn} and \end{CJK*}."


def _latex_table(table: Table, caption: str) -> list[str]:
    names, figures = len(table.heads), len(table.columns)
    groups = _column_groups(table)
    columns = "l" * names + "r" * figures
    # Three directions with intervals and differences are wider than a page at the size of the text.
    size = r"\centering\footnotesize\setlength{\tabcolsep}{4pt}"
    head = [r"\begin{table}", size, rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    if groups:
        spans = [rf"\multicolumn{{{count}}}{{c}}{{{escape_latex(name)}}}" for name, count in groups]
        head.append(" & ".join([*[""] * names, *spans]) + r" \\")
    head.append(" & ".join(map(escape_latex, (*table.heads, *(column.name for column in table.columns)))) + r" \\")
    end = [
        r"\bottomrule",
        r"\end{tabular}",
        r"\normalsize",
        rf"\caption{{{escape_latex(caption.strip())}}}",
        r"\end{table}",
    ]
    return [*head, r"\midrule", *map(_latex_row, table.rows), *end]


def _latex_row(row: Row) -> str:
    first, *others = map(escape_latex, row.names)
    role = f" ({escape_latex(row.role)})" if row.role else ""
    return " & ".join([first + role, *others, *map(_latex_entry, row.entries)]) + r" \\"


def _latex_entry(entry: Entry) -> str:
    value = rf"\textbf{{{escape_latex(entry.text)}}}" if entry.best else escape_latex(entry.text)
    value += escape_latex(f" ± {entry.spread}") if entry.spread else ""
    return value + (escape_latex(f" ({entry.small})") if entry.small else "") + escape_latex(entry.mark)
