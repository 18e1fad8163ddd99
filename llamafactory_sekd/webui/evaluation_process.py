"""The evaluation that a page asks for: from its fields to a YAML file, one child process at a time, its report."""

from __future__ import annotations

import itertools
import json
import re
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llamafactory_sekd.children import ChildError, Stopped, run_child
from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.errors import DataError
from llamafactory_sekd.evaluation.evaluation_settings import parse_settings
from llamafactory_sekd.reporting.figures import Look, canvas, distinct_looks
from llamafactory_sekd.reporting.metric_labels import metric_label, metric_look


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def read_report(save_dir: Path) -> str | None:
    """``report.md``, None where there is none."""
    path = save_dir / "report.md"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def report_files(save_dir: Path) -> list[str]:
    """Return the files to offer as links; none where Gradio may not serve them, outside of the working directory."""
    folder = save_dir.resolve()
    if not any(folder.is_relative_to(root.resolve()) for root in (Path.cwd(), Path(tempfile.gettempdir()))):
        return []
    own = [folder / name for name in ("report.html", "report.md", "report.tex", "results.json")]
    beyond = [folder.parent / f"{folder.name}{suffix}" for suffix in (".yaml", ".log")]
    return [str(path) for path in (*own, *beyond) if path.is_file()]


def draw_report(save_dir: Path) -> Figure | None:
    """Draw every system's scores, one picture per metric, and the similarity to the teacher; None without results."""
    path = save_dir / "results.json"
    if not path.is_file():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    tables = _tables(results)
    systems = dict(zip(results["systems"], itertools.cycle(distinct_looks()), strict=False))
    with canvas(len(tables), len(tables), height=3.4) as (figure, panels):
        figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.92))  # the page puts a label into the upper corner
        for axes, (title, table) in zip(panels, tables.items(), strict=True):
            _draw_bars(axes, title, table, systems)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


_Table = dict[str, dict[str, float | None]]


def _tables(results: dict[str, Any]) -> dict[str, _Table]:
    """Title to ``{system: {direction: value}}``, in the report's units."""
    tables: dict[str, _Table] = {}
    for metric in results["metrics"]:
        if metric in results["skipped"]:
            continue
        tables[metric_label(metric)] = {
            name: {
                direction: None
                if (value := system["scores"][direction][metric]) is None
                else value * metric_look(metric).scale
                for direction in results["directions"]
            }
            for name, system in results["systems"].items()
        }

    similarity = {name: system["similarity"] for name, system in results["systems"].items() if system["similarity"]}
    if similarity:
        tables["similarity to the teacher (BLEU)"] = {
            name: {direction: values[direction] for direction in results["directions"]}
            for name, values in similarity.items()
        }

    return tables


def _draw_bars(axes: Axes, title: str, table: _Table, systems: Mapping[str, Look]) -> None:
    directions = list(next(iter(table.values())))
    width = 0.8 / len(systems)
    for number, (system, look) in enumerate(systems.items()):
        if system not in table:
            continue
        places = [index - 0.4 + (number + 0.5) * width for index in range(len(directions))]
        heights = [value or 0.0 for value in table[system].values()]
        bars = axes.bar(places, heights, width, label=system, color=look.color)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)

    highest = max((value or 0.0 for values in table.values() for value in values.values()), default=0.0)
    axes.set_ylim(0, max(1.0, 1.12 * highest))
    axes.set_xticks(range(len(directions)), directions)
    axes.set_title(textwrap.fill(title, 22))
    axes.grid(visible=False, axis="x")
