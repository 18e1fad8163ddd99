"""A report as files, in all its forms."""

from __future__ import annotations

from pathlib import Path

from llamafactory_sekd.files import write_atomic
from llamafactory_sekd.reporting.document import Document
from llamafactory_sekd.reporting.html import render_html
from llamafactory_sekd.reporting.latex import render_latex
from llamafactory_sekd.reporting.markdown import render_markdown


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
