"""What a model costs to keep: its parameters and its bytes, read from the headers of its files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llamafactory_sekd.evaluation.system_fingerprint import locate
from llamafactory_sekd.evaluation.translator import ModelSource


_WEIGHTS = (".safetensors", ".bin", ".gguf")
# Optimizer states and the like are no part of a model.
_NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state")


@dataclass(frozen=True)
class Cost:
    """Sums over a base model and its adapters; ``parameters`` is None where the files do not tell."""

    parameters: int | None
    disk_bytes: int


def model_cost(sources: Iterable[ModelSource], system: str) -> Cost | None:
    """Return the cost of a model; None where its files are not here."""
    files: list[Path] = []
    for source in sources:
        folder = locate(source, system)
        if not isinstance(folder, Path):
            return None
        files += [
            path for path in folder.iterdir() if path.suffix in _WEIGHTS and not path.name.startswith(_NO_WEIGHTS)
        ]
    known = [_parameters(path) if path.suffix == ".safetensors" else None for path in files]
    total = sum(count for count in known if count is not None) if None not in known else None
    return Cost(total, sum(path.stat().st_size for path in files)) if files else None


def _parameters(path: Path) -> int:
    """Count the numbers in a safetensors file; packed ones, of quantized models, count as what holds them."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
