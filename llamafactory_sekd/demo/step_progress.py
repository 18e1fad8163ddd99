"""The demo's steps in a terminal or a log file, with the time that is left by plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.progress
from rich.console import Console
from rich.markup import escape

from llamafactory_sekd.reporting.terminal import ProgressView, show_seconds


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
