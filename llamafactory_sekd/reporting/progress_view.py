"""What a user sees while something takes long: bars in a terminal, a line now and then in a log file."""

from __future__ import annotations

import time

import rich.progress
from rich.console import Console
from rich.markup import escape


class ProgressView:
    """Bars with a name, a share and a note, and lines above them.

    Args:
        console: where to.
        bar_width: columns of a bar.
        line_every: seconds between two lines where there is no terminal.
    """

    def __init__(self, console: Console, bar_width: int, line_every: float) -> None:
        self.console = console
        self._line_every = line_every
        self._last_line = time.monotonic()
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=bar_width),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("[dim]{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def say(self, line: str, style: str = "") -> None:
        """Print a line above the bars."""
        self.console.print(escape(line), style=style, highlight=False, soft_wrap=True)

    def begin(self, what: str) -> None:
        """Say what has begun, where no bar shows it."""
        if not self.console.is_terminal:
            self.say(f"… {what}")

    def line_is_due(self) -> bool:
        """Tell whether a line about how far it is should be printed now, and count it as printed."""
        if self.console.is_terminal or time.monotonic() - self._last_line < self._line_every:
            return False
        self._last_line = time.monotonic()
        return True


def show_seconds(seconds: float) -> str:
    """Return a duration as people say it: ``45 s``, ``3 min 20 s``, ``35 min``, ``2 h 10 min``."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    # Nobody plans by the second what takes minutes, nor by the ten seconds what takes longer.
    minutes, rest = divmod(round(seconds, -1), 60)
    if minutes < 10 and rest:
        return f"{minutes:.0f} min {rest:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
