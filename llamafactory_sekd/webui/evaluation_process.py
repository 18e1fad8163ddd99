"""The evaluation that a page asks for: from its fields to a YAML file, and one child process at a time."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llamafactory_sekd.children import ChildError, Stopped, run_child
from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.errors import DataError
from llamafactory_sekd.evaluation.evaluation_settings import parse_settings


BASE = "base"
TEACHER = "teacher"
_BAR = re.compile(r"^(?P<label>[^\r\n]*?):\s+\d+%\|[^|]*\|\s*(?P<done>\d+)/(?P<total>\d+)")
_TAIL = 20_000


def checkpoint_list(chosen: str | list[str] | None) -> list[str]:
    """Return what the page's field for one or several checkpoints holds as a list."""
    return [chosen] if isinstance(chosen, str) and chosen else list(chosen or [])


def results_folder(task: str) -> str:
    """Return the default results folder of a test set."""
    return f"results/{re.sub(r'[^A-Za-z0-9._+-]+', '-', task).strip('-.') or 'test'}"


def follow_test_set(task: str, save_dir: str, followed: str) -> tuple[str, str]:
    """Return the results folder for a new test set, and what to compare it with next time.

    A folder belongs to one test set. One that the user typed stays as it is.

    Args:
        task: the test set.
        save_dir: what the field holds.
        followed: what this function put there last.
    """
    default = results_folder(task)
    return (default if save_dir.strip() in ("", followed) else save_dir), default


def system_names(checkpoints: Iterable[str], with_base: bool, with_teacher: bool) -> dict[str, str | None]:
    """Name the systems: a checkpoint after its folder, the model itself `base`, the teacher `teacher`.

    Returns:
        Name to checkpoint; None for the other two.
    """
    systems: dict[str, str | None] = {BASE: None} if with_base else {}
    reserved = {BASE, TEACHER}
    for checkpoint in checkpoints:
        stem = re.sub(r"[^A-Za-z0-9._+-]+", "-", Path(checkpoint).name).strip("-._+") or "system"
        name, count = stem, 2
        while name in systems or name in reserved:
            name, count = f"{stem}-{count}", count + 1
        systems[name] = checkpoint

    return {**systems, TEACHER: None} if with_teacher else systems


def evaluation_config(
    values: Mapping[str, Any], systems: Mapping[str, Mapping[str, Any]], template: str
) -> dict[str, Any]:
    """Return the keys of the YAML file.

    Args:
        values: what the section's fields hold, by the evaluation's own keys.
        systems: name to the host's model arguments.
        template: the host's template.
    """
    config = {
        "task": values["task"],
        "task_dir": values["task_dir"].strip(),
        "directions": list(values["directions"]),
        "template": template,
        "systems": {name: dict(arguments) for name, arguments in systems.items()},
        "baseline": values["baseline"] or None,
        "teacher": TEACHER if TEACHER in systems else None,
        "metrics": list(values["metrics"]),
        "comet_model": values["comet_model"].strip() if _uses_comet(values["metrics"]) else None,
        "prompt": values["prompt"].strip(),
        "num_beams": int(values["num_beams"]),
        "max_new_tokens": int(values["max_new_tokens"]),
        "save_dir": values["save_dir"].strip(),
    }
    return {key: value for key, value in config.items() if value not in (None, "")}


def check_config(config: Mapping[str, Any]) -> None:
    """Check keys and test sets; :class:`EvaluationError` or :class:`DataError` for the first that cannot work."""
    settings = parse_settings(config, "Translation quality")
    for direction in settings.directions:
        if not load_test_set(settings.task, settings.task_dir, str(direction)).sources:
            raise DataError(f"The test set {settings.task} {direction} in {settings.task_dir} is empty.")


def as_yaml(config: Mapping[str, Any]) -> str:
    """Return the file's text, keys in the order in which they are explained."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _uses_comet(metrics: Iterable[str]) -> bool:
    return any(metric.startswith("comet") for metric in metrics)


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
