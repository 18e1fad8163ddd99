"""The study's report: tables and plots in the paper's form, and what the paper does not show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from llamafactory_sekd.reporting.document import Column, Document, Entry, Row, Section, Table, write_document
from llamafactory_sekd.reporting.terminal import print_document
from llamafactory_sekd.study.report.cells import Study, read_study, short_names, shown
from llamafactory_sekd.study.report.score_sections import score_sections, validation_sections
from llamafactory_sekd.study.report.training_sections import training_sections
from llamafactory_sekd.study.report.translation_sections import translation_sections
from llamafactory_sekd.study.report.views import Views


# They differ from cell to cell by design, or say where things are.
_OF_A_CELL = {"output_dir", "seed", "data_seed", "overwrite_output_dir", "report_to"}


def write(
    results: Mapping[str, Any], folder: Path, root: Path | None = None, console: Console | None = None
) -> list[Path]:
    """Write ``report.md``, ``report.html``, ``report.tex`` and ``plots/*.png`` and ``.svg`` into ``folder``.

    The files say the same for the same results. A study that is not finished is reported as far as it is, and what is
    missing is named.

    Args:
        results: the contents of results.json (schema 1, see ``study/study_results.py``).
        folder: where the report goes, made if needed.
        root: the folder of results.json, to which the paths in it are relative; ``folder`` by default.
        console: where the main table is printed as well.

    Returns:
        what was written, the reports first.
    """
    document = build_document(read_study(results, root or folder))
    written = write_document(document, folder)
    if console is not None:
        print_document(document, console)
    return written


def build_document(study: Study) -> Document:
    """Return all sections that the study has something for."""
    views, name = Views(study), study.results["study"]
    sections = [
        _missing(study),
        *(score_sections(views) if study.directions else validation_sections(views)),
        *training_sections(views),
        *translation_sections(views),
        _settings(views),
    ]
    return Document(
        title=name if name.lower().startswith("study") else f"Study {name}",
        facts=tuple(_facts(views)),
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


def _facts(views: Views) -> Iterator[tuple[str, str]]:
    """Yield the facts at the top of the report: name and text."""
    study = views.study
    tested = study.results["test_set"]
    yield ("test set", str(tested["task"])) if tested is not None else ("judge", "validation metrics")
    for direction in study.directions if views.unreadable is None else ():
        yield direction, f"{len(views.texts.test_set(direction).sources):,} sentences"
    seeds = sorted({cell["seed"] for cell in study.results["cells"]})
    yield "seeds", ", ".join(map(str, seeds))
    if study.baseline is not None:
        yield "baseline", study.baseline
    if study.teacher is not None:
        yield "teacher", study.teacher


def _settings(views: Views) -> Section | None:
    names = short_names(views.groups)
    configs = {names[group]: dict(group.config) for group in views.groups if group.trained}
    if not configs:
        return None
    keys = [
        key for key in dict.fromkeys(key for config in configs.values() for key in config) if key not in _OF_A_CELL
    ]
    differing = [key for key in keys if len({repr(config.get(key)) for config in configs.values()}) > 1]
    rows = tuple(
        Row((name,), tuple(Entry(_value(config, key)) for key in differing)) for name, config in configs.items()
    )
    table = Table(("system",), tuple(Column(key) for key in differing), rows)
    first = next(iter(configs.values()))
    shared = tuple(f"{key}: {_value(first, key)}" for key in keys if key not in differing)
    note = (
        "The training keys in which the systems differ (– where a system does not set one), then those that all share."
    )
    return Section("Settings", note, tables=(table,) if differing else (), lines=shared)


def _value(config: dict[str, Any], key: str) -> str:
    return shown(config[key]) if key in config else "–"
