"""``report.html``: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from itertools import groupby

from jinja2 import Environment, PackageLoader, StrictUndefined

from llamafactory_sekd.reporting.document import Document, Plot, Table


def render_html(document: Document) -> str:
    """Return the complete report with its plots inside.

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
    return template.render(document=document, groups=_groups, image=_image)


def _groups(table: Table) -> list[tuple[str, int]]:
    """Return the headings over the columns with the number of columns below each; none where no column has one."""
    groups = [(name, len(list(columns))) for name, columns in groupby(column.group for column in table.columns)]
    return groups if any(name for name, _ in groups) else []


def _image(plot: Plot) -> str:
    kind, content = ("svg+xml", plot.svg) if plot.svg else ("png", plot.png)
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()
