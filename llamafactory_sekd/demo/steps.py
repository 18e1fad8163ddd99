"""A chain of steps that can be killed at any time and continued.

A finished step leaves a stamp with the fingerprint of all that went into it: its own ingredients and the fingerprints
of the steps it builds on. A step whose stamp still holds is passed over; one whose ingredients changed starts from
nothing; one that was interrupted resumes. A terminal or a log file shows the time that is left by plan.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import rich.progress
from rich.console import Console
from rich.markup import escape

from llamafactory_sekd.files import read_json, write_json
from llamafactory_sekd.fingerprints import sha256
from llamafactory_sekd.reporting.terminal import ProgressView, show_seconds


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
    # With this fingerprint, the step was interrupted, and its outputs are its own.
    if (read_json(stamp) or {}).get("fingerprint") != fingerprint:
        for path in step.outputs:
            _remove(path)
    write_json(stamp, {"fingerprint": fingerprint, "finished": False})
    step.action(report)
    write_json(stamp, {"fingerprint": fingerprint, "finished": True})


def _is_finished(step: Step, fingerprint: str, stamps: Path) -> bool:
    made = read_json(stamps / f"{step.name}.json") == {"fingerprint": fingerprint, "finished": True}
    return made and all(path.exists() for path in step.outputs)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class RemainingTime:
    """Estimates the remaining seconds from planned ones, corrected by how fast the plan is being worked off.

    ``now`` returns seconds; tests hand in their own clock.
    """

    def __init__(self, planned: float, now: Callable[[], float] = time.monotonic) -> None:
        self.planned = planned
        self.left = planned
        self.earned = 0.0
        self._now = now
        self._start = now()

    def work(self, seconds: float) -> None:
        """Count ``seconds`` of the plan as done in this run."""
        self.left -= seconds
        self.earned += seconds

    def credit(self, seconds: float) -> None:
        """Count ``seconds`` of the plan as done in an earlier run."""
        self.left -= seconds

    def estimate(self) -> float:
        """Return seconds; for the first few, the plan is all there is to go by."""
        pace = (self._now() - self._start) / self.earned if self.earned > 10 else 1.0
        return max(0.0, self.left * pace)


class Progress(ProgressView):
    """What the user sees while the steps run."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, bar_width=30, line_every=30.0)
        self.remaining = RemainingTime(0)

    def plan(self, seconds: float, later: float = 0.0) -> None:
        """Announce how much there is to do, ``later`` seconds of it after these steps."""
        self.remaining = RemainingTime(seconds + later)
        if seconds:
            self.console.print(
                f"About {show_seconds(seconds + later)} on two cores. Interrupted, the same command continues."
            )

    def skip(self, title: str) -> None:
        """Say that an earlier run finished a step."""
        self.console.print(f"[green]✓[/] {escape(title)} [dim](done before)[/]")

    def say(self, line: str, style: str = "dim") -> None:
        """Print a line above the bars."""
        super().say(line, style)

    @contextmanager
    def step(self, title: str, seconds: float) -> Iterator[Callable[[float], None]]:
        """Show a step while the block runs; yields the function that takes its finished share."""
        start, counted, first = time.monotonic(), 0.0, True
        self._last_line = start
        self.begin(title)
        bar = self._bars.add_task(escape(title), total=1.0, note="")

        def report(share: float) -> None:
            nonlocal counted, first
            gain = max(0.0, share * seconds - counted)
            # What the first report counts was done by an earlier run.
            (self.remaining.credit if first and share > 0.02 else self.remaining.work)(gain)
            counted, first = counted + gain, False
            self._show(bar, title, share)

        self._bars.start()
        try:
            yield report
        finally:
            self._bars.stop()
            self._bars.remove_task(bar)
        self.remaining.work(seconds - counted)
        self.console.print(f"[green]✓[/] {escape(title)} [dim]({show_seconds(time.monotonic() - start)})[/]")

    def _show(self, bar: rich.progress.TaskID, title: str, share: float) -> None:
        left = f"about {show_seconds(self.remaining.estimate())} left in all"
        self._bars.update(bar, completed=share, note=left)
        if self.line_is_due():
            self.console.print(f"  {escape(title)}: {share:.0%}, {left}")
