"""One view of the complete study: what is done, what runs and how far it is, and the time that is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from llamafactory_sekd.reporting.terminal import ProgressView, show_seconds


# Columns of a bar, and of all that follows a name.
_BAR, _BESIDE = 16, 54


class View(ProgressView):
    """What the user sees. Its methods may be called from several threads."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        super().__init__(console, bar_width=_BAR, line_every=60.0)
        self._total = total
        self._finished = done
        self._shares: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._earned = 0.0
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._overall = self._bars.add_task("study", total=max(1, total), completed=done, note="", visible=total > 0)

    def __enter__(self) -> View:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextmanager
    def preparing(self, what: str) -> Iterator[Callable[[float], None]]:
        """Show what comes before the jobs while the block runs; nobody knows how far it is."""
        bar = self._bars.add_task(self._fitting(what), total=None, note="")
        self.begin(what)
        start = time.monotonic()
        yield lambda share: None
        self._bars.remove_task(bar)
        self.say(f"✓ {what} ({show_seconds(time.monotonic() - start)})", "green")

    @contextmanager
    def running(self, name: str) -> Iterator[Callable[[float], None]]:
        """Show a job while the block runs; yields the function that takes its finished share, from 0 to 1."""
        bar = self._bars.add_task(f"  {self._fitting(name)}", total=1.0, note="")
        self.begin(name)

        def report(share: float) -> None:
            self._bars.update(bar, completed=share)
            self._count(name, share)

        try:
            yield report
        finally:
            self._bars.remove_task(bar)
            with self._lock:
                self._shares.pop(name, None)

    def finish(self, name: str, seconds: float) -> None:
        """Count a job as done."""
        with self._lock:
            self._finished += 1
            self._earned += 1 - self._first.pop(name, 0.0)
            self._shares.pop(name, None)
        self.say(f"✓ {name} ({show_seconds(seconds)})", "green")
        self._show()

    def fail(self, name: str, why: str) -> None:
        """Count a job as given up."""
        with self._lock:
            self._finished += 1
            self._first.pop(name, None)
        self.say(f"✗ {name}: {why}", "red")
        self._show()

    def _fitting(self, name: str) -> str:
        """Return a name that leaves room for its bar: long ones differ at their ends."""
        room = max(12, self.console.width - _BESIDE)
        return escape(name if len(name) <= room else f"{name[: room // 2 - 1]}…{name[-(room - room // 2) :]}")

    def _count(self, name: str, share: float) -> None:
        with self._lock:
            self._shares[name] = share
            self._first.setdefault(name, share)  # what the first report counts was done by an earlier run
        self._show()

    def _show(self) -> None:
        with self._lock:
            completed = self._finished + sum(self._shares.values())
            earned = self._earned + sum(share - self._first.get(name, 0.0) for name, share in self._shares.items())
            note = self._left(self._total - completed, earned)
            line = f"  {self._finished} of {self._total} done, {completed / max(1, self._total):.0%}, {note}"
            is_due = self.line_is_due()
        self._bars.update(self._overall, completed=completed, note=f"{self._finished}/{self._total} {note}")
        if is_due:
            self.say(line)

    def _left(self, rest: float, earned: float) -> str:
        elapsed = time.monotonic() - self._start
        if earned <= 0.02 or elapsed < 10:
            return ""
        return f"about {show_seconds(rest * elapsed / earned)} left"
