"""The commands of a study: what comes once, before all jobs, and a job from wherever it is to its scores."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llamafactory_sekd.checkpoints import find_checkpoints, share_of_training
from llamafactory_sekd.children import cores, host_command, printable, run_child, tool
from llamafactory_sekd.config import write_yaml
from llamafactory_sekd.data.products import DATASET_INFO
from llamafactory_sekd.errors import StudyError, one_line
from llamafactory_sekd.files import locked, read_json, write_json
from llamafactory_sekd.fingerprints import Digests
from llamafactory_sekd.study.jobs import (
    Job,
    difference,
    is_done,
    is_evaluated,
    is_trained,
    make_ready,
    mark_resumed,
    training_ingredients,
)
from llamafactory_sekd.study.matrix import Cell, TeacherText
from llamafactory_sekd.study.spec import Spec


# Cells that agree in these have the same examples; the others add theirs to the same cache.
_EXAMPLES = ("dataset", "eval_dataset", "dataset_dir", "max_samples", "val_size")
_TEACHER = ("teacher_model", "teacher_model_adapters", "teacher_model_quantization_bit")
_RECORD, _TEXTS = "preparation.json", "texts.json"


@dataclass(frozen=True)
class Preparation:
    """Runs what was not run before, one command at a time; :class:`ChildError` where one fails.

    ``announce`` is called with what is being done, and shows it for the length of a block.
    """

    spec: Spec
    environment: Mapping[str, str]
    announce: Callable[[str], AbstractContextManager[Callable[[float], None]]]
    stop: threading.Event

    def run_commands(self) -> None:
        """Run the commands of ``prepare``."""
        record = _read(self.spec)
        for number, (text, command) in enumerate(prepare_commands(self.spec), start=1):
            if text not in record["prepare"]:
                self._run(text, f"prepare-{number}", command)
                record["prepare"].append(text)
                write_json(self.spec.output_dir / _RECORD, record)

    def make_texts(self, texts: Sequence[TeacherText], evaluation: Mapping[str, Any]) -> None:
        """Let the teacher translate what the systems with `text: teacher` train on."""
        place = self.spec.output_dir / _TEXTS
        record = read_json(place) or {}
        digests = Digests(self.spec.output_dir / ".digests.json")
        for text in texts:
            made_of = _made_of(self.spec, text, digests)
            is_there = (text.folder / f"{text.name}.manifest.json").is_file()
            if not is_there or difference(record.get(text.name), made_of) is not None:
                [command] = text_commands(self.spec, [text], evaluation)
                self._run(f"the teacher's text {text.name}", text.name, command)
                record[text.name] = made_of
                write_json(place, record)
            _declare_originals(text)

    def cache_teacher(self, cells: list[Cell], devices: Sequence[str]) -> None:
        """Let ``sekd cache`` compute the teacher for all cells that read its cache."""
        record = _read(self.spec)
        digests = Digests(self.spec.output_dir / ".digests.json")
        for name, (cell, command) in cache_commands(self.spec, cells, devices).items():
            assert self.spec.teacher_cache is not None
            source = training_ingredients(cell.source, self.spec.teacher_cache, digests)
            made_of = {key: source[key] for key in ("teacher_cache", "models", "data", "versions")}
            made_of["config"] = {key: cell.source.get(key) for key in (*_TEACHER, *_EXAMPLES)}
            folder, known = self.spec.teacher_cache.folder, record["teacher_cache"].get(name)
            if not folder.is_dir() or known is None or difference(known, made_of) is not None:
                self._run(f"the teacher, once, into {folder}", name, command)
                record["teacher_cache"][name] = made_of
                write_json(self.spec.output_dir / _RECORD, record)

    def _run(self, what: str, name: str, command: list[str]) -> None:
        log = self.spec.output_dir / "logs" / f"{name}.log"
        with self.announce(what) as report:
            run_child(command, log, lambda: 0.0, report, environment=self.environment, stop=self.stop)


def remaining(spec: Spec) -> list[str]:
    """Return the commands of ``prepare`` that were not run yet."""
    return [text for text in spec.prepare if text not in _read(spec)["prepare"]]


def prepare_commands(spec: Spec) -> Iterator[tuple[str, list[str]]]:
    """Yield the text and the words of each command.

    ``sekd``, ``llamafactory-cli`` and ``python`` are those of this environment.
    """
    for text in spec.prepare:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise StudyError(f"`prepare`: {text!r} cannot be read as a command ({one_line(str(error))}).") from None
        if words[0] in ("python", "python3"):
            yield text, [sys.executable, *words[1:]]
        elif "/" in words[0]:
            yield text, words
        else:
            yield text, tool(*words)


def text_commands(spec: Spec, texts: Sequence[TeacherText], evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Return the command that makes each text."""
    return [tool("sekd", "translate", *_words(spec, text, evaluation)) for text in texts]


def _words(spec: Spec, text: TeacherText, evaluation: Mapping[str, Any]) -> list[str]:
    assert spec.teacher is not None
    model = dict(spec.models[spec.teacher])
    words = ["--model", str(model.pop("model_name_or_path"))]
    if "adapter_name_or_path" in model:
        words += ["--adapter", str(model.pop("adapter_name_or_path"))]
    words += ["--template", str(model.pop("template", None) or evaluation.get("template") or "parrot")]
    if text.dataset is not None:
        words += ["--dataset", text.dataset, "--dataset-dir", str(text.dataset_dir)]
    for key, value in text.options.items():
        words += _option(key, value)
    words += ["--out", str(text.folder), "--name", text.name, "--overwrite"]
    return [*words, *(f"{key}={value}" for key, value in model.items())]


def _option(key: str, value: Any) -> list[str]:
    return [f"--{key.replace('_', '-')}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]


def _made_of(spec: Spec, text: TeacherText, digests: Digests) -> dict[str, Any]:
    assert spec.teacher is not None
    source = {**spec.models[spec.teacher], "dataset_dir": str(text.dataset_dir), "dataset": text.dataset}
    found = training_ingredients({k: v for k, v in source.items() if v is not None}, None, digests)
    own = text.options.get("in")
    return {
        **found,
        "config": {**dict(spec.models[spec.teacher]), **text.options},
        "text": digests.of_file(Path(str(own))) if own is not None and Path(str(own)).is_file() else None,
    }


def _declare_originals(text: TeacherText) -> None:
    """Declare the original data sets next to the teacher's: the host reads training and validation from one folder."""
    info = read_json(text.dataset_dir / DATASET_INFO) or {}
    originals = {
        name: {**entry, "file_name": str((text.dataset_dir / entry["file_name"]).resolve())}
        if isinstance(entry, dict) and "file_name" in entry
        else entry
        for name, entry in info.items()
    }
    path = text.folder / DATASET_INFO
    merged = {**originals, **{name: e for name, e in (read_json(path) or {}).items() if name not in originals}}
    write_json(path, merged)


def cache_commands(spec: Spec, cells: list[Cell], devices: Sequence[str]) -> dict[str, tuple[Cell, list[str]]]:
    """Write a YAML per set of examples and return ``{name: (a cell that has them, the command)}``.

    The teacher runs on all devices, or without ``devices`` on those that this process sees. Raises
    :class:`StudyError` where the cells have several teachers, which one cache cannot hold.
    """
    if spec.teacher_cache is None:
        return {}
    cached = [cell for cell in cells if cell.reads_cache]
    teachers = {str([cell.source.get(key) for key in _TEACHER]): cell for cell in cached}
    if len(teachers) > 1:
        names = ", ".join(str(cell.source.get("teacher_model")) for cell in teachers.values())
        raise StudyError(f"`teacher_cache` holds one teacher, and the cells have several: {names}. Remove the key.")
    firsts: dict[str, Cell] = {}
    for cell in cached:
        firsts.setdefault(str([cell.source.get(key) for key in _EXAMPLES]), cell)
    options = [word for option in spec.teacher_cache.options.items() for word in _option(*option)]
    commands = {}
    for number, cell in enumerate(firsts.values(), start=1):
        name = "teacher_cache" if number == 1 else f"teacher_cache-{number}"
        path = spec.output_dir / f"{name}.yaml"
        words = ["cache", str(path), "--out", str(spec.teacher_cache.folder), *options]
        config = {**cell.source, "output_dir": str(spec.output_dir / "logs")}  # the host makes it, and nothing more
        write_yaml(path, config, f"sekd {shlex.join(words)}")
        commands[name] = (cell, _on_devices(cell, words, _gpu_count(devices)))
    return commands


def _on_devices(cell: Cell, words: list[str], ranks: int) -> list[str]:
    if ranks < 2 and not cell.source.get("deepspeed"):
        return tool("sekd", *words)
    launch = ("--standalone", "--nproc-per-node", str(max(1, ranks)), "-m", "llamafactory_sekd.cli")
    return tool("torchrun", *launch, *words)


def _gpu_count(devices: Sequence[str]) -> int:
    """Return how many GPUs a command without ``CUDA_VISIBLE_DEVICES`` of its own would take; 0 without any."""
    if devices:
        return len(devices)
    # Asked in a process of its own: torch would take half a gigabyte here for as long as the study runs.
    question = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    answer = subprocess.run(question, capture_output=True, text=True, check=False).stdout.split()
    return int(answer[-1]) if answer and answer[-1].isdigit() else 0


def _read(spec: Spec) -> dict[str, Any]:
    record = read_json(Path(spec.output_dir / _RECORD)) or {}
    return {"prepare": record.get("prepare", []), "teacher_cache": record.get("teacher_cache", {})}


def training_keys() -> frozenset[str]:
    """Return every key that the host reads in a training YAML, ours included.

    A child asks the host, so that the study's own process stays small for as long as it runs.

    Raises:
        StudyError: the host cannot be asked.
    """
    with TemporaryDirectory() as folder:
        done = subprocess.run(tool("sekd", "schema", folder), capture_output=True, text=True, check=False)
        schema = read_json(Path(folder) / "training.json")
    if done.returncode or schema is None:
        raise StudyError(f"The keys of a training cannot be checked: {one_line(done.stderr)[-300:]}")
    return frozenset(schema["properties"])


# With more threads than this, small models get slower; large ones compute on GPUs.
MAX_THREADS = 4
# Of a job with a training, the part of the progress bar that the training gets.
_TRAINING_PART = 0.85
Report = Callable[[float], None]


def typed_commands(job: Job) -> Iterator[str]:
    """Yield the commands that a user would type for this job, in order."""
    if job.cell is not None:
        variables = [f"{name}={value}" for name, value in _launch_environment(job.cell).items()]
        yield " ".join([*variables, printable(host_command("train", str(job.train_yaml)))])
    for name in job.evaluations:
        yield printable(host_command("eval", str(job.yaml_of(name))))


def _launch_environment(cell: Cell) -> dict[str, str]:
    """Return what the host asks for in addition to the command: DeepSpeed wants torchrun on a single device, too."""
    return {"FORCE_TORCHRUN": "1"} if cell.config.get("deepspeed") else {}


def run_job(
    job: Job,
    environment: Mapping[str, str],
    report: Report,
    stop: threading.Event,
) -> None:
    """Do what is left to do of a job.

    Raises :class:`ChildError` when a command fails, :class:`Stopped` when ``stop`` is set, and :class:`StudyError`
    when another process is at work on the same job.
    """
    lock = job.folder.parent.parent / ".locks" / f"{job.folder.parent.name}-{job.folder.name}"
    with locked(lock, f"Another process is at work on {job.id}: wait for it to end.", error=StudyError):
        if is_done(job):
            return
        make_ready(job)
        if job.cell is not None:
            if not is_trained(job):
                _train(job, environment, lambda share: report(_TRAINING_PART * share), stop)
            remove_checkpoints(job.model_folder)
        start = _TRAINING_PART if job.cell is not None else 0.0
        part = (1 - start) / max(1, len(job.evaluations))
        for number, name in enumerate(job.evaluations):
            if not is_evaluated(job, name):
                _evaluate(job, name, environment, partial(_report_part, report, start + number * part, part), stop)


def _report_part(report: Report, start: float, part: float, share: float) -> None:
    report(start + part * share)


def _train(job: Job, environment: Mapping[str, str], report: Report, stop: threading.Event) -> None:
    assert job.cell is not None
    command = host_command("train", str(job.train_yaml))
    # Checkpoints without the optimizer's state would continue a training that is not the same one.
    complete = None if job.cell.config.get("save_only_model") else find_checkpoints(job.model_folder)[0]
    if complete is None:
        shutil.rmtree(job.model_folder, ignore_errors=True)
    else:
        command.append(f"resume_from_checkpoint={complete}")
    mark_resumed(job, complete is not None)
    log, share_done = job.folder / "train.log", partial(share_of_training, job.model_folder)
    environment = {**environment, **_launch_environment(job.cell)}
    run_child(command, log, share_done, report, environment=environment, stop=stop)


def _evaluate(job: Job, name: str, environment: Mapping[str, str], report: Report, stop: threading.Event) -> None:
    directions = job.evaluations[name].test_sets

    def translated() -> float:
        finished = list((job.folder / name / "hypotheses").glob("*/*.txt"))
        return len(finished) / (len(directions) + 1)  # the last part is scoring

    command = host_command("eval", str(job.yaml_of(name)))
    run_child(command, job.folder / f"{name}.log", translated, report, environment=environment, stop=stop)


def remove_checkpoints(model: Path) -> None:
    """Remove a finished training's checkpoints, optimizer states and all; model, logs and plots stay."""
    for checkpoint in model.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def parse_devices(text: str | None) -> tuple[str, ...]:
    """Return the devices of ``--devices 0,1``; empty for none given."""
    if text is None:
        return ()
    devices = tuple(part.strip() for part in text.split(","))
    if not all(devices) or len(set(devices)) < len(devices):
        raise StudyError(f"`--devices {text}` cannot be used: name each device once, such as 0,1,2.")
    return devices


def environments(jobs: int, devices: Sequence[str]) -> list[dict[str, str]]:
    """Return the variables of each of ``jobs`` workers: its share of the devices, or one of them, and of the cores.

    Without devices each job sees what this process sees. What the user has set for the threads stays.
    """
    threads = {name: value for name, value in few_threads(jobs).items() if name not in os.environ}
    if not devices:
        return [dict(threads) for _ in range(jobs)]
    return [{**threads, "CUDA_VISIBLE_DEVICES": ",".join(_share(worker, jobs, devices))} for worker in range(jobs)]


def few_threads(jobs: int) -> dict[str, str]:
    """Return the variables that give each of ``jobs`` at a time threads for its share of the cores."""
    threads = max(1, min(MAX_THREADS, cores() // jobs))
    # Threads that spin while they wait run ten times slower where something else wants a core as well.
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}


def _share(worker: int, jobs: int, devices: Sequence[str]) -> Sequence[str]:
    if jobs >= len(devices):
        return [devices[worker % len(devices)]]
    first, last = (number * len(devices) // jobs for number in (worker, worker + 1))
    return devices[first:last]
