"""Building caches in this process, and the losses of a run to their last digit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from helpers.runs import train


def build(
    config: dict[str, Any],
    directory: Path,
    *,
    batch_size: int | None = None,
    say: Callable[[str], object] = lambda _: None,
    **settings: Any,
) -> Path:
    """Build a cache over the data sets of a training configuration."""
    from llamafactory_sekd.host.cache import build_cache
    from llamafactory_sekd.teacher.cache.cache_manifest import Settings

    with patch.dict(os.environ):  # transformers leaves the precision of a run there for the next one
        build_cache(config, directory, Settings(**settings), batch_size=batch_size, say=say)

    return directory


def from_cache(config: dict[str, Any], directory: Path, **overrides: Any) -> dict[str, Any]:
    """The same run with the cache in the teacher's place."""
    config = {key: value for key, value in config.items() if key != "teacher_model"}
    return {**config, "teacher_cache": str(directory), "output_dir": config["output_dir"] + "_cached", **overrides}


def losses(config: dict[str, Any]) -> list[float]:
    """Train and return the loss of every micro-batch, training and evaluation, unrounded."""
    from llamafactory_sekd.trainer import DistillationTrainer

    seen: list[float] = []
    original = DistillationTrainer.compute_loss

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        seen.append(float((result[0] if isinstance(result, tuple) else result).detach()))
        return result

    with patch.object(DistillationTrainer, "compute_loss", spy):
        train(config)

    return seen


@contextmanager
def counted_forwards() -> Iterator[list[int]]:
    """Collect the number of sequences of every forward pass of an online teacher."""
    from llamafactory_sekd.teacher import Teacher

    seen: list[int] = []
    original = Teacher.hidden_states

    def spy(self: Any, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return original(self, inputs, rows)

    with patch.object(Teacher, "hidden_states", spy):
        yield seen


def content(directory: Path) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """All records by key."""
    from llamafactory_sekd.teacher.cache.record_store import ShardReader

    reader = ShardReader(directory)
    return {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118


def assert_same_content(first: Path, second: Path, tolerance: float = 1e-5) -> None:
    """The same examples, with the same values up to the order of float32 sums."""
    ours, theirs = content(first), content(second)
    assert ours.keys() == theirs.keys()
    assert ours
    for key, record in ours.items():
        for name, values in record.items():
            torch.testing.assert_close(values, theirs[key][name], rtol=tolerance, atol=tolerance)
