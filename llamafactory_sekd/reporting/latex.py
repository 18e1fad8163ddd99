"""``report.tex``: the main tables for a paper, with booktabs."""

from __future__ import annotations

from itertools import groupby

from llamafactory_sekd.reporting.document import Document, Entry, Row, Table


_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "†": r"\textsuperscript{$\dagger$}",
        "▾": r"\textsuperscript{$\triangledown$}",
        "−": "$-$",
        "±": r"$\pm$",
        "–": "--",
        "↓": r"$\downarrow$",
        "β": r"$\beta$",
        "λ": r"$\lambda$",
        "Γ": r"$\Gamma$",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
    }
)


def escape(text: str) -> str:
    """Return ``text`` so that LaTeX prints it as it is."""
    return text.translate(_ESCAPES)


def render_latex(document: Document) -> str:
    """Return the tables of the main sections as ``table`` environments to be included in a paper."""
    lines = [r"% Needs \usepackage{booktabs} and \usepackage{amssymb}."]
    for section in document.sections:
        if section.main:
            for table in section.tables:
                title = section.title if not table.title or table.title in document.title else table.title
                lines += ["", *_table(table, f"{document.title}. {title}. {section.note}")]
    return "\n".join(lines) + "\n"


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
