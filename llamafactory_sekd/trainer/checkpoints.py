"""Checkpoints after a kill: which are whole, and what of ours they hold beside the trainer's own files."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME


STATE_NAME = "kd_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")  # all of them zip archives, whose directory is written last


@dataclass
class DistillationState:
    """What a checkpoint holds beside the trainer's own files.

    Attributes:
        teacher: fingerprint of the teacher's files, None where it came from a hub.
        window: sums of the metrics since the last log, over all ranks (see `TokenMeans`).
        adaptive: the sums behind the keys that follow the training, over all ranks (see `AdaptiveKeys`).
    """

    teacher: str | None = None
    window: list[float] = field(default_factory=list)
    adaptive: dict[str, list[float]] = field(default_factory=dict)

    def save(self, checkpoint: str | Path) -> None:
        """Write ``kd_state.json``, atomically."""
        path = Path(checkpoint) / STATE_NAME
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, checkpoint: str | Path) -> DistillationState:
        """Read ``kd_state.json``; an empty state for a checkpoint without it (of another stage)."""
        path = Path(checkpoint) / STATE_NAME
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else cls()


def find_checkpoints(output_dir: str | Path) -> tuple[Path | None, list[Path]]:
    """Return the last complete checkpoint of a run, and the half-written ones after it.

    The trainer writes `trainer_state.json` last, when every rank has written its own files; so a checkpoint without it
    was interrupted. Truncated weights and optimizer states are recognised as well, without reading them.
    """
    numbered = sorted(
        ((int(match[1]), path) for path in Path(output_dir).iterdir() if (match := _CHECKPOINT.fullmatch(path.name))),
        reverse=True,
    )
    half_written: list[Path] = []
    for step, path in numbered:
        if is_whole(path, step):
            return path, half_written

        half_written.append(path)

    return None, half_written


def is_whole(checkpoint: Path, step: int) -> bool:
    """Whether a checkpoint of this step was written to its end."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return state["global_step"] == step and all(
            _is_whole_file(path) for path in checkpoint.rglob("*") if path.is_file()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_whole_file(path: Path) -> bool:
    if path.suffix in _TORCH_SUFFIXES:
        return zipfile.is_zipfile(path)

    return path.suffix != ".safetensors" or path.stat().st_size == _size_in_header(path)


def _size_in_header(path: Path) -> int:
    """Return the length that a safetensors file says it has: 8 bytes, a JSON header of that size, the tensors."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(header_size))

    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + header_size + max(ends, default=0)


def forget_completion(checkpoint: str | Path) -> None:
    """Before a checkpoint is written over an older one: from here on it counts as half-written."""
    (Path(checkpoint) / TRAINER_STATE_NAME).unlink(missing_ok=True)
