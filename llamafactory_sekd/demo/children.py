"""Runs the commands that a user would type, watches them, and says where they stand."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from llamafactory_sekd.errors import HostError


POLL = 0.5
TAIL = 15
# With more threads than this, models of this size get slower.
MAX_THREADS = 4
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


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


def host_command(*arguments: str) -> list[str]:
    """Return ``llamafactory-cli …`` of this environment."""
    beside = Path(sys.executable).with_name("llamafactory-cli")
    found = str(beside) if beside.exists() else shutil.which("llamafactory-cli")
    if found is None:
        raise HostError("`llamafactory-cli` is not on the PATH: install LLaMA-Factory into this environment.")
    return [found, *arguments]


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
    command: Sequence[str], log: Path, share_done: Callable[[], float], report: Callable[[float], None]
) -> None:
    """Run ``command`` with its output in ``log``, and report the share that ``share_done`` returns now and then.

    The child ends with this process, however this process ends. Raises :class:`HostError` with the last lines of the
    log when the child fails.
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
            env={**os.environ, **environment()},
            preexec_fn=_end_with_parent if _LIBC is not None else None,
        )
        try:
            while child.poll() is None:
                report(share_done())
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=POLL)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if child.returncode != 0:
        raise HostError(
            f"{_tail(log)}\n`{printable(command)}` failed (status {child.returncode}): its whole log is {log}. "
            "The same command continues from here."
        )


def _end_with_parent() -> None:
    """Have the kernel end this child when its parent is gone, `kill -9` included."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # type: ignore[union-attr]


def _tail(log: Path) -> str:
    with open(log, encoding="utf-8", errors="replace") as stream:
        return "".join(deque(stream, TAIL)).rstrip()


def training_share(output_dir: Path) -> float:
    """Return how much of a training is done, from 0 to 1, by the host's own log in ``output_dir``."""
    try:
        last = (output_dir / "trainer_log.jsonl").read_text(encoding="utf-8").strip().rpartition("\n")[2]
        entry = json.loads(last)
        return min(1.0, entry["current_steps"] / entry["total_steps"])
    except (OSError, ValueError, KeyError, ZeroDivisionError):  # not there yet, or caught in the middle of a line
        return 0.0


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the latest whole checkpoint: its ``trainer_state.json``, which the host writes last, can be read."""
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for checkpoint in reversed(checkpoints):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return checkpoint
    return None


def moved(config: dict[str, Any], home: str, work: Path, prefix: str = "") -> list[str]:
    """Return the overrides ``key=value`` that move every path below ``home`` in a YAML file to ``work``."""
    if Path(home) == work:
        return []
    overrides: list[str] = []
    for key, value in config.items():
        if isinstance(value, dict):
            overrides += moved(value, home, work, f"{prefix}{key}.")
        elif isinstance(value, str) and value.startswith(f"{home}/"):
            overrides.append(f"{prefix}{key}={work / value.removeprefix(home + '/')}")
    return overrides


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))
