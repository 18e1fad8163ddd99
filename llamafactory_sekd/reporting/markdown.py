"""``report.md``."""

from __future__ import annotations

from llamafactory_sekd.reporting.document import Document, Entry, Line, Passage, Row, Section, Table


# What Markdown and the HTML inside it would act on.
_ESCAPES = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]#|~"} | {"<": "&lt;", "&": "&amp;"})


def escape(text: str) -> str:
    """Return ``text`` so that Markdown shows it as it is."""
    return text.translate(_ESCAPES)


def render_markdown(document: Document) -> str:
    """Return the report as GitHub-flavoured Markdown, with its plots as files in ``plots/``."""
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
    parts += [_passage(passage) for passage in section.passages]
    if section.lines:
        parts.append("\n".join(f"- {escape(line)}" for line in section.lines))
    return parts


def _table(one: Table) -> str:
    title = f"**{escape(one.title)}**\n\n" if one.title else ""
    if all(column.is_code for column in one.columns):
        # In a table, the strokes of a signature would have to be escaped, and could not be copied.
        rows = (
            f"- {escape(' '.join(row.names))}: `{', '.join(entry.text for entry in row.entries)}`" for row in one.rows
        )
        return title + "\n".join(rows)
    head = [*map(escape, one.heads), *(escape(f"{column.group} {column.name}".strip()) for column in one.columns)]
    rule = ["---"] * len(one.heads) + ["---:"] * len(one.columns)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, rule, *map(_row, one.rows))]
    return title + "\n".join(lines)


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


def _passage(passage: Passage) -> str:
    return "\n".join([f"**{escape(passage.title)}**", "", *map(_line, passage.lines)])


def _line(line: Line) -> str:
    figure = f" ({escape(line.figure)})" if line.figure else ""
    text = "".join(f"**{escape(span.text)}**" if span.marked else escape(span.text) for span in line.spans)
    return f"- {escape(line.who)}{figure}: {text or '*empty*'}"
