"""The results for people: a table in the terminal, ``report.md`` and a self-contained ``report.html``."""

from __future__ import annotations

from typing import Any

from llamafactory_sekd.evaluation.report.html import render_html
from llamafactory_sekd.evaluation.report.markdown import render_markdown
from llamafactory_sekd.evaluation.report.terminal import print_report
from llamafactory_sekd.evaluation.report.view import build_view
from llamafactory_sekd.evaluation.results import Evaluated
from llamafactory_sekd.files import write_atomic, write_json


def write_report(data: Evaluated, results: dict[str, Any]) -> None:
    """Write ``results.json``, ``report.md`` and ``report.html`` into ``save_dir`` and print the main table."""
    folder = data.settings.save_dir
    write_json(folder / "results.json", results)
    view = build_view(data, results)
    write_atomic(folder / "report.md", render_markdown(view))
    write_atomic(folder / "report.html", render_html(view))
    print_report(view, folder)
