"""Load a test set for evaluation, whatever layout the user has it in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from llamafactory_sekd.data.checks import Findings, Outcome, Pair, clean_pairs
from llamafactory_sekd.data.languages import Direction, parse_direction
from llamafactory_sekd.data.layout import TASKS, alma_files, alma_root, is_alma_direction, read_alma, text_files
from llamafactory_sekd.data.readers import read_text_pairs
from llamafactory_sekd.errors import DataError, EvaluationError


@dataclass(frozen=True)
class TestSet:
    """Sentences to translate and their references, aligned; no sentence contains a line break.

    ``fingerprint`` is the SHA-256 of sources and references: the same for the same text in any layout.
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    task: str
    direction: Direction
    sources: tuple[str, ...]
    references: tuple[str, ...]
    fingerprint: str


def load_test_set(task: str, task_dir: str | Path, direction: str) -> TestSet:
    """Load ``task`` in ``direction`` (``en-de``) from ``task_dir``.

    The task is ``wmt22``, ``wmt21_valid``, or the name of a folder in ``task_dir`` with a test set of one's own.
    ``task_dir`` is what ``sekd data alma`` wrote, a clone of ALMA, or a folder of ``<src>-<tgt>.<lang>`` files, looked
    for in that order. Raises :class:`EvaluationError` for an unknown task and :class:`DataError` for an unknown
    direction, missing, misaligned or empty files, and sentences that are empty or not UTF-8.
    """
    directory = Path(task_dir)
    if task not in TASKS and not (directory / task).is_dir():
        raise EvaluationError(f"Unknown task {task!r}: use one of {', '.join(TASKS)}, or a folder in `task_dir`.")
    parsed = parse_direction(direction)
    if not directory.is_dir():
        raise DataError(f"task_dir {task_dir} is not a directory: make it with `sekd data alma --out {task_dir}`.")

    findings = Findings()
    pairs = clean_pairs(_find(task, directory, parsed), findings)
    # Training data can do without a bad pair; a score over fewer sentences than announced would be a false one.
    for problem, file, line in findings.items:
        if problem.outcome is Outcome.LEFT_OUT:
            raise DataError(f"{file}:{line}: {problem.words}; a test set must be complete: fix it or remove the pair.")
    return _test_set(task, parsed, pairs)


def _find(task: str, directory: Path, direction: Direction) -> list[Pair]:
    own, plain = text_files(directory / task, direction), text_files(directory, direction)
    if any(path.exists() for path in own):
        return _read_both(own)
    root = alma_root(directory)
    if task in TASKS and is_alma_direction(direction) and alma_files(root, direction, TASKS[task]):
        return read_alma(root, direction, TASKS[task])
    if any(path.exists() for path in plain):
        return _read_both(plain)
    raise DataError(
        f"No {task} test set for {direction} in {directory}: `sekd data alma` makes {task}/{own[0].name} and "
        f"{task}/{own[1].name}; a clone of ALMA, or {plain[0].name} and {plain[1].name}, will do too."
    )


def _read_both(files: tuple[Path, Path]) -> list[Pair]:
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is missing next to its partner: a test set needs both files.")
    return read_text_pairs(*files)


def _test_set(task: str, direction: Direction, pairs: list[Pair]) -> TestSet:
    sources = tuple(pair.source for pair in pairs)
    references = tuple(pair.target for pair in pairs)
    content = json.dumps([sources, references], ensure_ascii=False).encode("utf-8")
    return TestSet(task, direction, sources, references, hashlib.sha256(content).hexdigest())
