"""The study's report: tables and plots in the paper's form, and what the paper does not show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamafactory_sekd.reporting.document_files import write_document
from llamafactory_sekd.study.report.cells import read_study
from llamafactory_sekd.study.report.study_report import build_document


def write(results: Mapping[str, Any], folder: Path, root: Path | None = None) -> list[Path]:
    """Write ``report.md``, ``report.html``, ``report.tex`` and ``plots/*.png`` and ``.svg`` into ``folder``.

    The files say the same for the same results. A study that is not finished is reported as far as it is, and what is
    missing is named.

    Args:
        results: the contents of results.json (schema 1, see ``study/study_results.py``).
        folder: where the report goes, made if needed.
        root: the folder of results.json, to which the paths in it are relative; ``folder`` by default.

    Returns:
        what was written, the reports first.
    """
    return write_document(build_document(read_study(results, root or folder)), folder)
