"""One evaluation at a time, as a child process of the page."""

from __future__ import annotations

import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from llamafactory_sekd.children import ChildError, Stopped, run_child


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
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._status: int | None = None
        self.save_dir: Path | None = None

    @property
    def running(self) -> bool:
        """Tell whether the evaluation is running."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def stopped(self) -> bool:
        """Tell whether the user ended it."""
        return self._stop.is_set()

    @property
    def return_code(self) -> int | None:
        """Return the exit status; None before the end, and for an evaluation that was stopped."""
        return None if self.running else self._status

    @staticmethod
    def config_path(save_dir: Path) -> Path:
        """Where the YAML file of an evaluation is written."""
        return save_dir.parent / f"{save_dir.name}.yaml"

    def start(self, config_text: str, save_dir: Path) -> None:
        """Write the YAML file and start the child."""
        config, log = self.config_path(save_dir), self._log_path(save_dir)
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(config_text, encoding="utf-8")
        log.unlink(missing_ok=True)  # what an earlier evaluation printed
        self.save_dir, self._status, self._stop = save_dir, None, threading.Event()
        # A thread of its own, as long as the child: the kernel ends the child with the thread that started it, and the
        # page's threads come and go.
        self._thread = threading.Thread(target=self._run, args=(config, log), daemon=True)
        self._thread.start()

    def _run(self, config: Path, log: Path) -> None:
        # Not through `llamafactory-cli`, which depends on torch's entry points being on.
        command = [sys.executable, "-m", "llamafactory_sekd", "eval", str(config)]
        try:
            run_child(command, log, lambda: 0.0, lambda _: None, environment={}, stop=self._stop)
            self._status = 0
        except ChildError as error:
            self._status = error.status
        except Stopped:
            pass

    def stop(self) -> None:
        """End the child and what it started; finished sentences are kept and the next start goes on from there."""
        if self.running:
            self._stop.set()

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
