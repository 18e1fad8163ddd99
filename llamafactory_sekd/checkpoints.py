"""Checkpoints after a kill: the one rule for a complete one, and what of ours they hold next to the trainer's files.

Nothing here imports torch: a study looks at hundreds of checkpoints before it starts its first run.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamafactory_sekd.files import read_json, write_atomic


STATE_NAME = "kd_state.json"
TRAINER_STATE_NAME = "trainer_state.json"  # as transformers names it
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")  # all of them zip archives, whose directory is written last
_INDEX = ".index.json"  # behind the name of weights that are split over several files


@dataclass
class DistillationState:
    """What a checkpoint holds next to the trainer's own files.

    Attributes:
        teacher: fingerprint of the teacher's files, None where it came from a hub.
        window: sums of the metrics since the last log, over all ranks (see ``TokenMeans``).
        adaptive: the sums behind the keys that follow the training, over all ranks (see ``AdaptiveKeys``).
        own_samples: the student's samples that further steps use, of all ranks, by example (see ``OwnSamples``).
    """

    teacher: str | None = None
    window: list[float] = field(default_factory=list)
    adaptive: dict[str, list[float]] = field(default_factory=dict)
    own_samples: dict[str, list[int]] = field(default_factory=dict)

    def save(self, checkpoint: str | Path) -> None:
        """Write ``kd_state.json``, atomically."""
        write_atomic(Path(checkpoint) / STATE_NAME, json.dumps(asdict(self)))

    @classmethod
    def load(cls, checkpoint: str | Path) -> DistillationState:
        """Read ``kd_state.json``; return an empty state for a checkpoint without it (of another stage)."""
        path = Path(checkpoint) / STATE_NAME
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else cls()


def find_checkpoints(output_dir: str | Path, save_only_model: bool = False) -> tuple[Path | None, dict[Path, str]]:
    """Return the last complete checkpoint of a run, and the incomplete ones after it with what is wrong with each.

    Args:
        output_dir: the run's; it may be missing.
        save_only_model: the run's own key: its checkpoints have no optimizer.
    """
    folder = Path(output_dir)
    paths = folder.iterdir() if folder.is_dir() else iter(())
    numbered = sorted(
        ((int(match[1]), path) for path in paths if (match := _CHECKPOINT.fullmatch(path.name))), reverse=True
    )
    incomplete: dict[Path, str] = {}
    for _, path in numbered:
        defect = defect_of(path, save_only_model)
        if defect is None:
            return path, incomplete
        incomplete[path] = defect
    return None, incomplete


def defect_of(checkpoint: Path, save_only_model: bool = False) -> str | None:
    """Return what keeps a checkpoint from being complete, in a few words, or None.

    Complete means: every file that the run's own settings ask for is there and readable. The trainer writes
    ``trainer_state.json`` last, when every rank has written its own files, so a checkpoint without it was interrupted.
    Truncated weights and optimizer states are recognized as well, without reading them.
    """
    state = read_json(checkpoint / TRAINER_STATE_NAME)
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    if not isinstance(state, dict) or "global_step" not in state:
        return f"{TRAINER_STATE_NAME} is missing or cannot be read"
    if match and state["global_step"] != int(match[1]):
        return f"{TRAINER_STATE_NAME} is of step {state['global_step']}"
    return next(_missing(checkpoint, save_only_model), None) or next(_truncated(checkpoint), None)


def has_optimizer(checkpoint: Path) -> bool:
    """Return whether a run can continue from a checkpoint with the optimizer that it had."""
    return any(_any_file(checkpoint, pattern) for pattern in ("optimizer.pt", "optimizer.bin", *_SHARDED_OPTIMIZERS))


def share_of_training(output_dir: Path) -> float:
    """Return how much of a training is done, from 0 to 1, by the host's own log in ``output_dir``."""
    try:
        last = (output_dir / "trainer_log.jsonl").read_text(encoding="utf-8").strip().rpartition("\n")[2]
        entry = json.loads(last)
        return min(1.0, entry["current_steps"] / entry["total_steps"])
    except (OSError, ValueError, KeyError, ZeroDivisionError):  # not there yet, or caught in the middle of a line
        return 0.0


def forget_completion(checkpoint: str | Path) -> None:
    """Mark a checkpoint that is about to be written over: from here on it counts as incomplete."""
    (Path(checkpoint) / TRAINER_STATE_NAME).unlink(missing_ok=True)


# DeepSpeed writes a folder per step with a file per rank, FSDP a folder of shards.
_SHARDED_OPTIMIZERS = ("global_step*/*optim_states.pt", "optimizer_*/*")
_SHARDED_WEIGHTS = ("global_step*/*model_states.pt", "pytorch_model_fsdp*/*", "pytorch_model_fsdp*.bin")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")


def _missing(checkpoint: Path, save_only_model: bool) -> Iterator[str]:
    weights = [name for name in _WEIGHTS if (checkpoint / name).is_file()]
    for name in _WEIGHTS:
        index = checkpoint / f"{name}{_INDEX}"
        if index.is_file():
            weights.append(index.name)
            listed = read_json(index)
            shards = sorted(set(listed["weight_map"].values())) if isinstance(listed, dict) else [index.name]
            yield from (f"{shard} is missing" for shard in shards if not (checkpoint / shard).is_file())
    if not weights and not any(_any_file(checkpoint, pattern) for pattern in _SHARDED_WEIGHTS):
        yield "the weights are missing"
    if save_only_model:
        return
    if not has_optimizer(checkpoint):
        yield "the optimizer's state is missing"
    if not _any_file(checkpoint, "rng_state*.pth"):
        yield "the random number generator's state is missing"
    is_deepspeed = _any_file(checkpoint, "global_step*/*")  # whose own schedulers are in its own files
    if not is_deepspeed and not (checkpoint / "scheduler.pt").is_file():
        yield "the scheduler's state is missing"


def _truncated(checkpoint: Path) -> Iterator[str]:
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and not _is_complete_file(path):
            yield f"{path.relative_to(checkpoint)} is cut off"


def _any_file(checkpoint: Path, pattern: str) -> bool:
    return next(checkpoint.glob(pattern), None) is not None


def _is_complete_file(path: Path) -> bool:
    try:
        if path.suffix in _TORCH_SUFFIXES:
            return zipfile.is_zipfile(path)
        return path.suffix != ".safetensors" or path.stat().st_size == _size_in_header(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _size_in_header(path: Path) -> int:
    """Return the length that a safetensors file claims: 8 bytes, a JSON header of that many bytes, the tensors."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(header_size))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + header_size + max(ends, default=0)
