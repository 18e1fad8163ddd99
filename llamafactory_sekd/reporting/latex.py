"""``report.tex``: the main tables for a paper, with booktabs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from llamafactory_sekd.reporting.document import Document, Entry, Row, Table


# Hyphens that are followed by another one: LaTeX would make a dash of them.
_HYPHEN = "\x00"
_ESCAPES = str.maketrans(
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


def escape(text: str) -> str:
    """Return ``text`` so that LaTeX prints it as it is, on one line."""
    return re.sub(r"-(?=-)", _HYPHEN, re.sub(r"\s+", " ", text)).translate(_ESCAPES)


def render_latex(document: Document) -> str:
    """Return the tables of the main sections as ``table`` environments to be included in a paper.

    The first lines say what the paper's preamble needs for them.
    """
    lines = []
    for section in document.sections:
        if section.main:
            for table in section.tables:
                title = section.title if not table.title or table.title in document.title else table.title
                lines += ["", *_table(table, f"{document.title}. {title}. {section.note}")]
    return "\n".join([*_needs("\n".join(lines)), *lines]) + "\n"


def _needs(tables: str) -> Iterator[str]:
    others = [character for character in dict.fromkeys(tables) if not character.isascii()]
    latin = [character for character in others if _LATIN.match(character)]
    encoding = r" and \usepackage[T1]{fontenc}" if latin else ""
    yield rf"% Needs \usepackage{{booktabs}} and \usepackage{{amssymb}}{encoding}."
    foreign = "".join(character for character in others if character not in latin)
    if foreign:
        yield f"% Characters beyond Latin: {foreign[:60]}"
        yield r"% XeLaTeX and LuaLaTeX print them with a font that has them. pdfLaTeX needs a package, for Chinese"
        yield r"% \usepackage{CJKutf8} and the tables between \begin{CJK*}{UTF8}{gbsn} and \end{CJK*}."


def _table(table: Table, caption: str) -> list[str]:
    names, figures = len(table.heads), len(table.columns)
    groups = [(name, len(list(columns))) for name, columns in groupby(column.group for column in table.columns)]
    columns = "l" * names + "r" * figures
    # Three directions with intervals and differences are wider than a page at the size of the text.
    size = r"\centering\footnotesize\setlength{\tabcolsep}{4pt}"
    head = [r"\begin{table}", size, rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    if any(name for name, _ in groups):
        spans = [rf"\multicolumn{{{count}}}{{c}}{{{escape(name)}}}" for name, count in groups]
        head.append(" & ".join([*[""] * names, *spans]) + r" \\")
    head.append(" & ".join(map(escape, (*table.heads, *(column.name for column in table.columns)))) + r" \\")
    end = [r"\bottomrule", r"\end{tabular}", r"\normalsize", rf"\caption{{{escape(caption.strip())}}}", r"\end{table}"]
    return [*head, r"\midrule", *map(_row, table.rows), *end]


def _row(row: Row) -> str:
    first, *others = map(escape, row.names)
    role = f" ({escape(row.role)})" if row.role else ""
    return " & ".join([first + role, *others, *map(_entry, row.entries)]) + r" \\"


def _entry(entry: Entry) -> str:
    value = rf"\textbf{{{escape(entry.text)}}}" if entry.best else escape(entry.text)
    value += escape(f" ± {entry.spread}") if entry.spread else ""
    return value + (escape(f" ({entry.small})") if entry.small else "") + escape(entry.mark)
