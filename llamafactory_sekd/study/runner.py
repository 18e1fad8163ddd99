"""One job through the host's real commands, from wherever it is to its scores, on its share of the devices."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from llamafactory_sekd.checkpoints import find_checkpoints, share_of_training
from llamafactory_sekd.children import host_command, printable, run_child
from llamafactory_sekd.errors import StudyError
from llamafactory_sekd.files import locked
from llamafactory_sekd.study.jobs import Job, is_done, is_evaluated, is_trained, make_ready, mark_resumed
from llamafactory_sekd.study.matrix import Cell


# With more threads than this, small models get slower; large ones compute on GPUs.
_MAX_THREADS = 4
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {"OMP_NUM_THREADS": str(max(1, min(_MAX_THREADS, cores // jobs)))}
    # Threads that spin while they wait run ten times slower where something else wants a core as well.
    threads["OMP_WAIT_POLICY"] = "PASSIVE"
    threads = {name: value for name, value in threads.items() if name not in os.environ}
    if not devices:
        return [dict(threads) for _ in range(jobs)]
    return [{**threads, "CUDA_VISIBLE_DEVICES": ",".join(_share(worker, jobs, devices))} for worker in range(jobs)]


def _share(worker: int, jobs: int, devices: Sequence[str]) -> Sequence[str]:
    if jobs >= len(devices):
        return [devices[worker % len(devices)]]
    first, last = (number * len(devices) // jobs for number in (worker, worker + 1))
    return devices[first:last]
