"""Put the report together."""

from __future__ import annotations

from llamafactory_sekd.reporting.document import Document, Section
from llamafactory_sekd.study.report.cells import Study
from llamafactory_sekd.study.report.sections import (
    compared_keys,
    score_tables,
    training,
    translations,
    validation_tables,
)
from llamafactory_sekd.study.report.views import Views


def build_document(study: Study) -> Document:
    """Return all sections that the study has something for."""
    views = Views(study)
    sections = [
        _missing(study),
        *(score_tables.sections(views) if study.directions else validation_tables.sections(views)),
        *training.sections(views),
        *translations.sections(views),
        *compared_keys.sections(views),
    ]
    return Document(
        title=f"Study {study.results['study']}",
        facts=tuple(compared_keys.facts(views)),
        sections=tuple(section for section in sections if section is not None),
    )


def _missing(study: Study) -> Section | None:
    if not study.missing:
        return None
    cells = len(study.results["cells"]) + len(study.results["models"])
    return Section(
        "What is missing",
        alarm=f"{len(study.missing)} of {cells} runs are not finished. Everything below excludes them.",
        lines=study.missing,
    )
