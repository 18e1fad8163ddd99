"""The demo's surroundings: what its commands run with, and another folder than the one that its YAML files name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


# With more threads than this, models of this size get slower.
MAX_THREADS = 4


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


def moved(value: Any, home: str, work: Path) -> Any:
    """Return a YAML file's content with every path below ``home`` moved to ``work``."""
    if isinstance(value, dict):
        return {key: moved(entry, home, work) for key, entry in value.items()}
    if isinstance(value, list):
        return [moved(entry, home, work) for entry in value]
    if isinstance(value, str) and value.startswith(f"{home}/"):
        return str(work / value.removeprefix(f"{home}/"))
    return value
