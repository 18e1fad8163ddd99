"""The study for a cluster: the commands of all its runs, and a SLURM array over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from llamafactory_sekd.children import printable, write_array
from llamafactory_sekd.errors import StudyError
from llamafactory_sekd.study.engine import Inputs, Study
from llamafactory_sekd.study.jobs import make_ready
from llamafactory_sekd.study.preparation import cache_commands, prepare_commands
from llamafactory_sekd.study.runner import typed_commands
from llamafactory_sekd.study.teacher_text import commands


def list_commands(study: Study, inputs: Inputs) -> Iterator[str]:
    """Write every run's files and yield the commands, one line per run.

    The first lines, what has to be done once, come before all others.
    """
    yield from (printable(command) for _, command in prepare_commands(study.spec))
    made = commands(study.spec, study.texts, study.evaluation)
    yield from (printable(command) for command in made.values())
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
