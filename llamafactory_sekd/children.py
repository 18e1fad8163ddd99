"""Runs the commands that a user would type and watches them, or writes them as a SLURM array."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from llamafactory_sekd.errors import HostError, SekdError, one_line
from llamafactory_sekd.files import write_atomic


POLL = 0.5
TAIL = 15
_PR_SET_PDEATHSIG = 1
# Looked up here: between fork and exec nothing may take a lock that another thread held.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


class ChildError(HostError):
    """A ``command`` failed; ``status`` is its exit status, ``log`` its output, whose last lines the message shows."""

    def __init__(self, command: Sequence[str], status: int, log: Path) -> None:
        super().__init__(
            f"{tail(log)}\n`{printable(command)}` failed (status {status}): its complete log is {log}. "
            "The same command continues from here."
        )
        self.command = command
        self.status = status
        self.log = log


class Stopped(Exception):
    """A command was ended because the caller asked for it."""


def tool(name: str, *arguments: str) -> list[str]:
    """Return the command ``name`` of this environment; :class:`HostError` where it is not installed."""
    sibling = Path(sys.executable).with_name(name)
    found = str(sibling) if sibling.exists() else shutil.which(name)
    if found is None:
        raise HostError(f"`{name}` is not on the PATH: install it into this environment.")
    return [found, *arguments]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_command(*arguments: str) -> list[str]:
    """Return ``llamafactory-cli …`` of this environment."""
    return tool("llamafactory-cli", *arguments)


def printable(command: Sequence[str]) -> str:
    """Return the command as the user can type it in this folder."""
    program = Path(command[0])
    here = Path.cwd()
    if shutil.which(program.name) == str(program):
        shown = program.name
    else:
        shown = str(program.relative_to(here)) if program.is_relative_to(here) else str(program)
    return shlex.join([shown, *command[1:]])


def run_child(
    command: Sequence[str],
    log: Path,
    share_done: Callable[[], float],
    report: Callable[[float], None],
    *,
    environment: Mapping[str, str],
    stop: threading.Event | None = None,
) -> None:
    """Run ``command`` with its output in ``log``, and report the share that ``share_done`` returns now and then.

    The child ends with this process, however this process ends. ``environment`` is added to this process's
    own. Raises :class:`ChildError` when the child fails, and :class:`Stopped` when ``stop`` was set and ended it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as stream:
        stream.write(f"$ {printable(command)}\n".encode())
        stream.flush()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            preexec_fn=end_with_parent,
            process_group=0,  # what the child starts, torchrun and its ranks, can be ended with it
        )
        try:
            while child.poll() is None:
                if stop is not None and stop.is_set():
                    raise Stopped
                report(share_done())
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=POLL)
        finally:
            if child.poll() is None:
                _end_group(child)
    if child.returncode != 0:
        raise ChildError(command, child.returncode, log)


def end_with_parent() -> None:
    """Have the kernel end this process when its parent is gone, `kill -9` included (Linux; elsewhere nothing)."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_rank_with_launcher() -> None:
    """On a rank that torchrun or `accelerate launch` started: end with it, however it ends.

    Without a launcher the parent is a user's shell, which a training started with `nohup` outlives.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End a child, and then whatever of its group did not end with it."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(timeout=10)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def tail(log: Path, lines: int = TAIL) -> str:
    """Return the last lines of a log."""
    with open(log, encoding="utf-8", errors="replace") as stream:
        return "".join(deque(stream, lines)).rstrip()


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
