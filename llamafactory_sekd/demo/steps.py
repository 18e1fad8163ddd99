"""A chain of steps that can be killed at any time and continued.

A finished step leaves a stamp with the fingerprint of all that went into it: its own ingredients and the fingerprints
of the steps it builds on. A step whose stamp still holds is passed over; one whose ingredients changed starts from
nothing; one that was interrupted resumes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.demo.step_progress import Progress
from llamafactory_sekd.files import write_atomic
from llamafactory_sekd.fingerprints import sha256


@dataclass(frozen=True)
class Step:
    """One step.

    Args:
        name: short, unique; names the stamp.
        title: what the progress says.
        seconds: how long it takes on two cores, for the remaining time.
        action: does it; is called with a function to report the finished share, from 0 to 1. After an interruption it
            finds what it left.
        outputs: files and folders that it makes; they are removed when the ingredients changed.
        ingredients: whatever decides the outcome besides the steps in ``needs``.
        needs: names of earlier steps.
    """

    name: str
    title: str
    seconds: float
    action: Callable[[Callable[[float], None]], None]
    outputs: tuple[Path, ...]
    ingredients: str
    needs: tuple[str, ...] = ()


def run_steps(steps: Sequence[Step], stamps: Path, progress: Progress, later: float = 0.0) -> None:
    """Run what is not finished, in order.

    Args:
        steps: the steps.
        stamps: the folder of the stamps.
        progress: what the user sees.
        later: planned seconds of what comes after these steps.
    """
    fingerprints = fingerprint_all(steps)
    todo = [step for step in steps if not _is_finished(step, fingerprints[step.name], stamps)]
    progress.plan(sum(step.seconds for step in todo), later)
    for step in steps:
        if step not in todo:
            progress.skip(step.title)
            continue
        with progress.step(step.title, step.seconds) as report:
            _run(step, fingerprints[step.name], stamps, report)


def fingerprint_all(steps: Sequence[Step]) -> dict[str, str]:
    """Return the fingerprint of each step, which covers those of the steps that it needs."""
    fingerprints: dict[str, str] = {}
    for step in steps:
        content = [step.name, step.ingredients, *(fingerprints[name] for name in step.needs)]
        fingerprints[step.name] = sha256(json.dumps(content))
    return fingerprints


def _run(step: Step, fingerprint: str, stamps: Path, report: Callable[[float], None]) -> None:
    stamp = stamps / f"{step.name}.json"
    if _read(stamp).get("fingerprint") != fingerprint:  # else the step was interrupted, and its outputs are its own
        for path in step.outputs:
            _remove(path)
    write_atomic(stamp, json.dumps({"fingerprint": fingerprint, "finished": False}).encode())
    step.action(report)
    write_atomic(stamp, json.dumps({"fingerprint": fingerprint, "finished": True}).encode())


def _is_finished(step: Step, fingerprint: str, stamps: Path) -> bool:
    made = _read(stamps / f"{step.name}.json") == {"fingerprint": fingerprint, "finished": True}
    return made and all(path.exists() for path in step.outputs)


def _read(stamp: Path) -> dict[str, Any]:
    try:
        return json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
