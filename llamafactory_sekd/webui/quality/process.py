"""One evaluation at a time, as a child process of the page."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil


_BAR = re.compile(r"^(?P<label>[^\r\n]*?):\s+\d+%\|[^|]*\|\s*(?P<done>\d+)/(?P<total>\d+)")
_TAIL = 20_000


@dataclass(frozen=True)
class Progress:
    """What the child's last progress bar says."""

    label: str
    done: int
    total: int


class EvaluationProcess:
    """Runs ``llamafactory-cli eval`` on a YAML file next to the results; what it prints goes there, too.

    The results' own folder is the evaluation's: it refuses one that holds anything else.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self.save_dir: Path | None = None
        self.stopped = False

    @property
    def running(self) -> bool:
        """Tell whether the evaluation is running."""
        return self._child is not None and self._child.poll() is None

    @property
    def return_code(self) -> int | None:
        """Return the exit status, None before the end."""
        return None if self._child is None else self._child.poll()

    @staticmethod
    def config_path(save_dir: Path) -> Path:
        """Where the YAML file of an evaluation is written."""
        return save_dir.parent / f"{save_dir.name}.yaml"

    def start(self, config_text: str, save_dir: Path) -> None:
        """Write the YAML file and start the child."""
        config = self.config_path(save_dir)
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(config_text, encoding="utf-8")
        self.save_dir, self.stopped = save_dir, False
        with open(self._log_path(save_dir), "wb") as log:
            # Not through `llamafactory-cli`, which depends on torch's entry points being on.
            self._child = subprocess.Popen(
                [sys.executable, "-m", "llamafactory_sekd", "eval", str(config)], stdout=log, stderr=subprocess.STDOUT
            )

    def stop(self) -> None:
        """End the child and what it started; finished sentences are kept and the next start goes on from there."""
        if self._child is None or not self.running:
            return

        self.stopped = True
        try:
            family = [*psutil.Process(self._child.pid).children(recursive=True), psutil.Process(self._child.pid)]
            for process in family:
                process.terminate()
        except psutil.NoSuchProcess:
            pass

    def output(self) -> list[str]:
        """Return the lines printed so far, each as a terminal would show it after its last carriage return."""
        if self.save_dir is None or not self._log_path(self.save_dir).is_file():
            return []

        text = self._log_path(self.save_dir).read_bytes()[-_TAIL:].decode("utf-8", errors="replace")
        return [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]

    def progress(self) -> Progress | None:
        """Return the last progress bar, None before the first."""
        for line in reversed(self.output()):
            if match := _BAR.match(line):
                return Progress(match["label"].strip(), int(match["done"]), int(match["total"]))

        return None

    @staticmethod
    def _log_path(save_dir: Path) -> Path:
        return save_dir.parent / f"{save_dir.name}.log"
