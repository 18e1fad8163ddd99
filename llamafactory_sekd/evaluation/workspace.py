"""Ownership and locking of an evaluation's directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.evaluation_settings import Settings
from llamafactory_sekd.files import locked, read_json, write_json


_CONFIGURATION = "evaluation.json"


@contextmanager
def open_workspace(settings: Settings, test_sets: Mapping[str, str]) -> Iterator[None]:
    """Hold ``save_dir`` for the length of the block.

    ``test_sets`` maps the directions to the fingerprints of their test sets. Systems and directions may be added to an
    evaluation; what all systems share may not change. Raises :class:`EvaluationError` when ``save_dir`` holds
    something else, when it was made with another configuration, or when another run is at work in it.
    """
    folder = settings.save_dir
    check_workspace(settings, test_sets)
    busy = f"Another evaluation is running in `save_dir` {folder}: wait for it to end."
    with locked(folder / ".lock", busy, error=EvaluationError):
        known = (read_json(folder / _CONFIGURATION) or {}).get("test_sets", {})
        write_json(folder / _CONFIGURATION, {**_shared(settings), "test_sets": {**known, **test_sets}})
        yield


def check_workspace(settings: Settings, test_sets: Mapping[str, str]) -> None:
    """Raise :class:`EvaluationError` when ``save_dir`` cannot take this evaluation."""
    folder = settings.save_dir
    if folder.exists() and not folder.is_dir():
        raise EvaluationError(f"`save_dir` {folder} is a file, not a directory.")
    before = read_json(folder / _CONFIGURATION)
    if before is None:
        # Hidden files are ours: the lock, and what a killed run was writing.
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise EvaluationError(f"`save_dir` {folder} holds something other than an evaluation: use another one.")
        return
    for key, value in _shared(settings).items():
        if before.get(key) != value:
            raise _other_configuration(folder, f"`{key}` {before.get(key)}", str(value))
    for direction, fingerprint in test_sets.items():
        if before["test_sets"].get(direction, fingerprint) != fingerprint:
            raise _other_configuration(folder, f"another {direction} test set", settings.task_dir.as_posix())


def _other_configuration(folder: Path, before: str, now: str) -> EvaluationError:
    return EvaluationError(
        f"`save_dir` {folder} holds an evaluation with {before}, and this one has {now}: use another `save_dir`."
    )


def _shared(settings: Settings) -> dict[str, Any]:
    return {"task": settings.task, "template": settings.template, **asdict(settings.decoding)}
