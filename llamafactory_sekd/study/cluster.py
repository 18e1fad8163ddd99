"""The study for a cluster: the commands of all its runs, and a SLURM array over them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from llamafactory_sekd.children import printable
from llamafactory_sekd.errors import StudyError, one_line
from llamafactory_sekd.files import write_atomic
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
    # A line break would end the comment or the option that it is in, and what follows would be a command.
    for text in (str(path), study.spec.name, str(Path.cwd()), *study_command):
        if len(text.splitlines()) > 1:
            raise StudyError(f"{one_line(text)!r} has a line break, which a SLURM script cannot hold: remove it.")
    logs = study.spec.output_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)  # SLURM ends a job that cannot open its log
    text = _SLURM.format(
        path=shlex.quote(str(path)),
        name=study.spec.name,
        job_name=re.sub(r"[^\w.-]+", "-", study.spec.name, flags=re.ASCII),
        last=count - 1,
        output=shlex.quote(str(logs / "slurm-%a.log")),
        folder=shlex.quote(str(Path.cwd())),
        command=shlex.join(study_command),
    )
    write_atomic(path, text)


_SLURM = """\
#!/bin/bash
# Every run of the study {name}, one array task each, in an environment in which `sekd` is found:
#   sbatch {path}
# What has to be done once is done by the first task that comes; the others wait for it. A task that was ended
# continues when it is submitted again, and one that is done ends at once. When all are done, collect and report:
#   {command}
#SBATCH --job-name={job_name}
#SBATCH --array=0-{last}
#SBATCH --output={output}
# Yours to fill in: the partition, the time, and the devices of one run.
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --time=24:00:00

set -euo pipefail
cd {folder}
exec {command} --only "$SLURM_ARRAY_TASK_ID"
"""
