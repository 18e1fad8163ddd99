"""Which devices and how many threads each of several jobs at a time gets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from llamafactory_sekd.errors import StudyError


# With more threads than this, small models get slower; large ones compute on GPUs.
_MAX_THREADS = 4


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


def count(devices: Sequence[str]) -> int:
    """Return how many GPUs a command without ``CUDA_VISIBLE_DEVICES`` of its own would take; 0 without any."""
    if devices:
        return len(devices)
    # Asked in a process of its own: torch would take half a gigabyte here for as long as the study runs.
    question = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    answer = subprocess.run(question, capture_output=True, text=True, check=False).stdout.split()
    return int(answer[-1]) if answer and answer[-1].isdigit() else 0


def _share(worker: int, jobs: int, devices: Sequence[str]) -> Sequence[str]:
    if jobs >= len(devices):
        return [devices[worker % len(devices)]]
    first, last = (number * len(devices) // jobs for number in (worker, worker + 1))
    return devices[first:last]
