"""Runs what is not done of a study, several jobs at a time, and writes its results."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llamafactory_sekd.children import ChildError, Stopped, printable, tail, write_array
from llamafactory_sekd.errors import SekdError, StudyError
from llamafactory_sekd.files import locked, read_json
from llamafactory_sekd.study.jobs import (
    Evaluation,
    Job,
    changed,
    is_done,
    is_trained,
    list_jobs,
    make_ready,
    read_evaluation,
    with_test_sets,
)
from llamafactory_sekd.study.matrix import Cell, TeacherText, expand
from llamafactory_sekd.study.running import (
    Preparation,
    cache_commands,
    environments,
    prepare_commands,
    remaining,
    run_job,
    text_commands,
    typed_commands,
)
from llamafactory_sekd.study.spec import Spec
from llamafactory_sekd.study.study_progress import View
from llamafactory_sekd.study.study_results import CSV, JSON, collect, write_results


@dataclass(frozen=True)
class Study:
    """A study whose files were read and checked; its inputs need not be there yet.

    ``evaluation`` is empty where the validation metrics of the trainings are the judge.
    """

    spec: Spec
    cells: list[Cell]
    evaluation: dict[str, Any]
    validation: dict[str, Any] | None = None

    @property
    def texts(self) -> list[TeacherText]:
        """Return the data sets that the teacher has to make."""
        # Several systems train on the same text; it is made once.
        return list({cell.text.name: cell.text for cell in self.cells if cell.text is not None}.values())


@dataclass(frozen=True)
class Inputs:
    """What is there once the study's ``prepare`` has run; ``test`` is None without an evaluation."""

    test: Evaluation | None
    jobs: list[Job]


def open_study(spec: Spec) -> Study:
    """Read the files that a study names; one line for what cannot work, as a :class:`SekdError`."""
    chosen_on = spec.select.evaluation if spec.select is not None else None
    # Read at once, though its test sets are looked at later: a mistyped key should not show after hours of training.
    validation = read_evaluation(chosen_on) if chosen_on is not None else None
    evaluation = read_evaluation(spec.evaluation) if spec.evaluation is not None else {}
    return Study(spec, expand(spec), evaluation, validation)


def find_inputs(study: Study) -> Inputs:
    """Look at models and data; :class:`SekdError` where a test set is missing, or validates as well."""
    try:
        test = with_test_sets(study.evaluation) if study.evaluation else None
        validation = with_test_sets(study.validation) if study.validation is not None else None
    except SekdError as error:
        # A missing file is what an unfinished preparation looks like, so the message names what was not run.
        left = remaining(study.spec)
        hint = f" `prepare` was not run yet: {'; '.join(left)}" if left else ""
        raise StudyError(f"{error}{hint}") from None
    if validation is not None and test is not None:
        _check_apart(test, validation)
    return Inputs(test, list_jobs(study.spec, study.cells, test, validation))


def _check_apart(test: Evaluation, validation: Evaluation) -> None:
    tested = {test_set.fingerprint for test_set in test.test_sets.values()}
    for direction, validated in validation.test_sets.items():
        # By content: a copy under another name would leak just the same.
        if validated.fingerprint in tested:
            raise StudyError(
                f"`select.evaluation` holds the study's own test set of {direction}, and a setting must not be chosen "
                "on the test set: name a validation set."
            )


def run_study(study: Study, *, jobs: int, devices: Sequence[str], console: Console) -> list[str]:
    """Run all that is not done and write the results; return the ids of the jobs that failed.

    Raises :class:`SekdError` where nothing can be run, and KeyboardInterrupt with all children ended.
    """
    stop = threading.Event()
    busy = f"Another process is at work on the study in {study.spec.output_dir}: wait for it to end."
    with locked(study.spec.output_dir / ".lock", busy, error=StudyError):
        try:
            inputs = _prepare(study, devices, console, stop)
            return _run(study, inputs, environments(jobs, devices), console, stop)
        finally:
            stop.set()  # threads and children look at it: none outlives a failure or an interruption


def run_one(study: Study, chosen: str, *, devices: Sequence[str], console: Console) -> list[str]:
    """Run one job, by its id or its number in the list, next to others on other machines; results are not written.

    The first to come runs what has to be done once; the others wait for it.
    """
    stop = threading.Event()
    inputs = _prepare(study, devices, console, stop)
    job = find_job(inputs.jobs, chosen)
    return _run_all([job], inputs, environments(1, devices), console, stop, done=0)


def find_job(jobs: Sequence[Job], chosen: str) -> Job:
    """Return the job of an id or a number from 0; :class:`StudyError` where there is none."""
    # Numbers are for Slurm arrays, whose tasks know nothing else.
    by_name = {job.id: job for job in jobs} | {str(number): job for number, job in enumerate(jobs)}
    if chosen not in by_name:
        raise StudyError(f"`--only {chosen}`: there is no such run; `--list` has them, from 0 to {len(jobs) - 1}.")
    return by_name[chosen]


def changes(inputs: Inputs) -> Iterator[str]:
    """Yield a line for each job that was done from something else than the study now asks for."""
    for job in inputs.jobs:
        difference = changed(job)
        if difference is not None:
            yield f"{job.id}: {difference}"


def write_study(study: Study, inputs: Inputs) -> dict[str, Any]:
    """Collect what is there, write results.json and results.csv, and return the results."""
    # From the files of the jobs alone: whoever ran them, on whatever machine, they are in the results.
    results = collect(study.spec, inputs.jobs, inputs.test)
    write_results(results, study.spec.output_dir)
    return results


def report(study: Study, console: Console | None = None) -> list[Path]:
    """Write the report on what results.json holds; return the paths of what a reader looks for.

    The main table is printed to ``console`` where there is one.
    """
    from llamafactory_sekd.study.report.study_report import write  # loads matplotlib

    folder = study.spec.output_dir
    written = write(read_json(folder / JSON), folder, console=console)
    return [folder / JSON, folder / CSV, *(path for path in written if path.parent == folder)]


def list_commands(study: Study, inputs: Inputs) -> Iterator[str]:
    """Write every run's files and yield the commands, one line per run.

    The first lines, what has to be done once, come before all others.
    """
    yield from (printable(command) for _, command in prepare_commands(study.spec))
    made = text_commands(study.spec, study.texts, study.evaluation)
    yield from (printable(command) for command in made)
    yield from (printable(command) for _, command in cache_commands(study.spec, study.cells, ()).values())
    for job in inputs.jobs:
        make_ready(job)
        yield " && ".join(typed_commands(job))


def write_slurm(path: Path, study_command: Sequence[str], study: Study, count: int) -> None:
    """Write a SLURM script that runs job ``$SLURM_ARRAY_TASK_ID`` of ``count``; ``study_command`` without options.

    Raises:
        StudyError: a name or an override holds a line break.
    """
    write_array(
        path,
        study_command,
        '--only "$SLURM_ARRAY_TASK_ID"',
        what=f"Every run of the study {study.spec.name}",
        name=study.spec.name,
        notes=(
            "The first task does the work that is needed once; the others wait for it. A task that was stopped",
            "resumes when it is submitted again, and a finished one ends at once. When all are done, collect and",
            "report:",
        ),
        afterwards=study_command,
        tasks=(0, count - 1),
        logs=study.spec.output_dir / "logs",
        error=StudyError,
    )


def _prepare(study: Study, devices: Sequence[str], console: Console, stop: threading.Event) -> Inputs:
    environment = environments(1, devices)[0]
    # Several machines may run one study: who comes second waits, and finds everything prepared.
    lock = locked(study.spec.output_dir / ".prepare.lock", error=StudyError, wait=True)
    try:
        with lock, View(console, 0, 0) as view:
            preparation = Preparation(study.spec, environment, view.preparing, stop)
            preparation.run_commands()
            preparation.make_texts(study.texts, study.evaluation)
            inputs = find_inputs(study)
            cached = [job for job in inputs.jobs if job.cell is not None and job.cell.reads_cache]
            # A cache takes the teacher's time and much disk: not for a study that only has to be evaluated again.
            if any(changed(job) is not None or not is_trained(job) for job in cached):
                preparation.cache_teacher(study.cells, devices)
    except ChildError as error:  # without what comes first nothing can be run
        raise StudyError(f"`{printable(error.command)}` failed: {_words(error)}") from None
    return inputs


def _run(
    study: Study, inputs: Inputs, workers: list[dict[str, str]], console: Console, stop: threading.Event
) -> list[str]:
    for line in changes(inputs):
        console.print(f"{line}; it will be rerun", highlight=False, markup=False, soft_wrap=True)
    todo = sorted((job for job in inputs.jobs if not is_done(job)), key=lambda job: _turn(study.spec, job))
    done = len(inputs.jobs) - len(todo)
    if done:
        console.print(f"{done} of {len(inputs.jobs)} done before.", highlight=False)
    # Written whatever happens: a study that was stopped, or of which a job failed, has results of all others.
    try:
        return _run_all(todo, inputs, workers, console, stop, done=done)
    finally:
        write_study(study, inputs)


def _turn(spec: Spec, job: Job) -> int:
    """Seed by seed, so that a study that is not finished already compares all systems."""
    return spec.seeds.index(job.cell.seed) if job.cell is not None else -1


def _run_all(
    todo: Sequence[Job],
    inputs: Inputs,
    workers: list[dict[str, str]],
    console: Console,
    stop: threading.Event,
    *,
    done: int,
) -> list[str]:
    # A queue and not an order: jobs differ in length, and a device should not wait for the turn of another one.
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    # A worker is a device or a share of one, as environment variables of the children.
    for worker in workers:
        free.put(worker)
    failed: list[str] = []

    def work(job: Job) -> float:
        # There are as many threads as workers, so this never waits for long.
        environment = free.get()
        start = time.monotonic()
        try:
            with view.running(job.id) as report:
                run_job(job, environment, report, stop)
        finally:
            free.put(environment)
        return time.monotonic() - start

    with View(console, done + len(todo), done) as view, ThreadPoolExecutor(len(workers)) as pool:
        futures = {pool.submit(work, job): job for job in todo}
        try:
            for future in as_completed(futures):
                why = _failure(future)
                if why is None:
                    view.finish(futures[future].id, future.result())
                else:
                    failed.append(futures[future].id)
                    view.fail(futures[future].id, why)
        except BaseException:
            # KeyboardInterrupt too. Leaving the pool waits for its threads: those that run end their children at
            # `stop`, and no further job starts.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _failure(future: Future[float]) -> str | None:
    """Return in one line why a job failed, None if it did not; what is a bug is raised."""
    error = future.exception()
    if error is None:
        return None
    if isinstance(error, ChildError):
        return _words(error)
    # A full disk or a lost mount takes down one job like a failed child; the study goes on with the others.
    if isinstance(error, (SekdError, OSError)):
        return str(error)
    if isinstance(error, Stopped):
        return "stopped"
    raise error


def _words(error: ChildError) -> str:
    return f"status {error.status}, {_reason(error.log)} (log: {error.log})"


def _reason(log: Path) -> str:
    """Return the log's last line that names an error, or its last one; launchers write more lines after it."""
    lines = [" ".join(line.split()) for line in tail(log, 100).splitlines() if line.strip()]
    # Not the traceback's last frame and not torchrun's summary: the line with the exception says what to do.
    errors = [line for line in lines if re.search(r"(Error|Exception|error):", line)]
    return (errors or lines)[-1][-300:]
