"""How DeepSpeed spreads a run over devices and main memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamafactory_sekd.errors import ArgumentError


@dataclass(frozen=True)
class Sharding:
    """The part of a DeepSpeed configuration that decides about memory; defaults are DeepSpeed's. Sizes are elements.

    Attributes:
        stage: 0 to 3: nothing, optimizer states, gradients too, parameters too.
        offload_optimizer: whether optimizer states and gradients lie in main memory.
        offload_param: whether parameters do (stage 3).
        reduce_bucket: gradients that are reduced at once.
        buckets: how many such buffers there are.
        prefetch: parameters that are gathered ahead (stage 3).
        reuse_distance: parameters that are used again within it stay gathered (stage 3).
        sub_group: parameters that the optimizer updates at once (stage 3).
    """

    stage: int
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket: int = 500_000_000
    buckets: int = 1
    prefetch: int = 50_000_000
    reuse_distance: int = 1_000_000_000
    sub_group: int = 1_000_000_000

    @property
    def shards_optimizer(self) -> bool:
        """Tell whether each rank holds a part of the optimizer's states."""
        return self.stage >= 1

    @property
    def shards_gradients(self) -> bool:
        """Tell whether each rank holds a part of the gradients."""
        return self.stage >= 2

    @property
    def shards_parameters(self) -> bool:
        """Tell whether each rank holds a part of the weights."""
        return self.stage >= 3


def read_deepspeed(config: Mapping[str, Any], hidden_size: int) -> Sharding:
    """Read a DeepSpeed configuration, with `auto` replaced as Hugging Face's trainer does.

    Args:
        config: the file's contents.
        hidden_size: the student's width, from which `auto` sizes are made.

    Raises:
        ArgumentError: the stage is not a number from 0 to 3.
    """
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ArgumentError(f"`zero_optimization.stage: {stage}` of the DeepSpeed file cannot be used: use 0 to 3.")

    def size(key: str, default: int, auto: int) -> int:
        value = zero.get(key, default)
        return auto if value == "auto" else int(float(value))

    square = hidden_size * hidden_size
    overlapped = zero.get("overlap_comm", False) and stage in (1, 2)
    return Sharding(
        stage=stage,
        offload_optimizer=_is_offloaded(zero.get("offload_optimizer")),
        offload_param=stage == 3 and _is_offloaded(zero.get("offload_param")),
        reduce_bucket=size("reduce_bucket_size", Sharding.reduce_bucket, square),
        buckets=2 if overlapped else 1,
        prefetch=size("stage3_prefetch_bucket_size", Sharding.prefetch, int(0.9 * square)),
        reuse_distance=size("stage3_max_reuse_distance", Sharding.reuse_distance, Sharding.reuse_distance),
        sub_group=size("sub_group_size", Sharding.sub_group, Sharding.sub_group),
    )


def _is_offloaded(entry: Any) -> bool:
    return isinstance(entry, Mapping) and entry.get("device", "none") != "none"
