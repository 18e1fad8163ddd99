"""What was compared: the facts at the top, the keys in which the systems differ, the keys that they share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llamafactory_sekd.reporting.document import Column, Entry, Row, Section, Table
from llamafactory_sekd.study.report.cells import short_names, shown
from llamafactory_sekd.study.report.views import Views


# They differ from cell to cell by design, or say where things are.
_OF_A_CELL = {"output_dir", "seed", "data_seed", "overwrite_output_dir", "report_to"}


def facts(views: Views) -> Iterator[tuple[str, str]]:
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


def sections(views: Views) -> Iterator[Section | None]:
    """Yield the sections about settings."""
    names = short_names(views.groups)
    configs = {names[group]: dict(group.config) for group in views.groups if group.trained}
    if not configs:
        return
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
    yield Section("Settings", note, tables=(table,) if differing else (), lines=shared)


def _value(config: dict[str, Any], key: str) -> str:
    return shown(config[key]) if key in config else "–"
