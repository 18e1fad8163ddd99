"""``report.md``."""

from __future__ import annotations

from llamafactory_sekd.evaluation.report.markdown import escape, table
from llamafactory_sekd.study.report.document import Document, Entry, Row, Section, Table


def render_markdown(document: Document) -> str:
    """Return the report as GitHub-flavoured Markdown, with the plots beside it in ``plots/``."""
    facts = "; ".join(f"{escape(name)} {escape(value)}" for name, value in document.facts)
    parts = [f"# {escape(document.title)}", facts]
    for section in document.sections:
        parts += _section(section)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> list[str]:
    parts = [f"## {escape(section.title)}"]
    if section.alarm:
        parts.append(f"**{escape(section.alarm)}**")
    parts.append(escape(section.note))
    parts += [_table(one) for one in section.tables]
    parts += [
        f"![{escape(plot.caption)}](plots/{plot.name}.png)\n\n*{escape(plot.caption)}*" for plot in section.plots
    ]
    if section.lines:
        parts.append("\n".join(f"- {escape(line)}" for line in section.lines))
    return parts


def _table(one: Table) -> str:
    columns = [escape(f"{column.group} {column.name}".strip()) for column in one.columns]
    return table([*map(escape, one.heads), *columns], [_row(row) for row in one.rows], texts=len(one.heads))


def _row(row: Row) -> list[str]:
    first, *others = map(escape, row.names)
    role = f" *({row.role})*" if row.role else ""
    return [first + role, *others, *map(_entry, row.entries)]


def _entry(entry: Entry) -> str:
    value = escape(entry.text)
    if entry.best or entry.alarm:
        value = f"**{value}**"
    value += f" ± {entry.spread}" if entry.spread else ""
    return value + entry.mark + (f" ({escape(entry.small)})" if entry.small else "")
