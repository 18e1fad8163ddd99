"""A SLURM array script over the tasks of one command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from llamafactory_sekd.errors import SekdError, one_line
from llamafactory_sekd.files import write_atomic


def write_array(
    path: Path,
    command: Sequence[str],
    task: str,
    *,
    what: str,
    name: str,
    notes: Sequence[str],
    afterwards: Sequence[str],
    tasks: tuple[int, int],
    logs: Path,
    error: type[SekdError],
) -> None:
    """Write the script.

    Args:
        path: of the script.
        command: what each task runs.
        task: what follows the command in a task, as bash reads it; ``$SLURM_ARRAY_TASK_ID`` is its number.
        what: is run, as the script's first line says it.
        name: of the job.
        notes: lines on the tasks.
        afterwards: the command that comes when all are done.
        tasks: the first and the last number.
        logs: a folder, which is made: SLURM ends a job that cannot open its log.
        error: raised where a name or a word of a command holds a line break.
    """
    # A line break would end the comment or the option that it is in, and what follows would be a command.
    for text in (str(path), what, name, str(logs), str(Path.cwd()), *command, *afterwards):
        if len(text.splitlines()) > 1:
            raise error(f"{one_line(text)!r} has a line break, which a SLURM script cannot hold: remove it.")
    logs.mkdir(parents=True, exist_ok=True)
    text = _SCRIPT.format(
        path=shlex.quote(str(path)),
        what=what,
        notes="".join(f"# {note}\n" for note in notes),
        job_name=re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII),
        first=tasks[0],
        last=tasks[1],
        output=shlex.quote(str(logs / "slurm-%a.log")),
        folder=shlex.quote(str(Path.cwd())),
        afterwards=shlex.join(afterwards),
        command=shlex.join(command),
        task=task,
    )
    write_atomic(path, text)


_SCRIPT = """\
#!/bin/bash
# {what}, one array task each, in an environment in which `sekd` is found:
#   sbatch {path}
{notes}#   {afterwards}
#SBATCH --job-name={job_name}
#SBATCH --array={first}-{last}
#SBATCH --output={output}
# Yours to fill in: the partition, the time, and the devices of one run.
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --time=24:00:00

set -euo pipefail
cd {folder}
exec {command} {task}
"""
