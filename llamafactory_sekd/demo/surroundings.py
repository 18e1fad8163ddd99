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
