"""What the planner has to know of a training run, and how DeepSpeed spreads it over devices and main memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.errors import ArgumentError


@dataclass(frozen=True)
class Blueprint:
    """How to build a model, and how it is kept.

    Attributes:
        build: returns the model as training has it: parameters in their types, frozen or trainable, gradient
            checkpointing set up. It is called on the device `meta`, so it may not read weights.
        quantization_bit: 4 or 8 where bitsandbytes keeps the linear layers (all but the head) in so many bits.
        double_quantization: whether the scales of 4 bits are quantized themselves.
    """

    build: Callable[[], nn.Module]
    quantization_bit: int | None = None
    double_quantization: bool = True


@dataclass(frozen=True)
class TeacherPlace:
    """Where the teacher's weights are while its forward pass does not need them.

    Attributes:
        kind: `device` (the student's), `main memory`, `another device`, or `student` where they are its base.
        streamed: whether they come to the device layer by layer.
        adapters: bytes of the adapters that it has in addition to the student's base.
        sharding: of its own engine, None for the student's.
    """

    kind: str = "device"
    streamed: bool = False
    adapters: int = 0
    sharding: Sharding | None = None


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        student: the model that is trained.
        teacher: None without one (supervised fine-tuning, or a teacher's cache).
        distillation: the stage's keys; None for supervised fine-tuning.
        batch_size: sentences of one micro-batch on one device.
        length: tokens of each, prompt and response.
        responses: the share of the tokens that belong to responses.
        accumulation: micro-batches per optimizer step.
        autocast: the type of mixed precision, None without it. Under DeepSpeed it is `engine_dtype` instead.
        engine_dtype: the type in which DeepSpeed keeps both models' parameters, None for their own.
        optimizer: the host's `optim`.
        devices: how many take part.
        sharding: DeepSpeed's, None where every device keeps everything.
        accelerator: whether the devices are accelerators; otherwise each is a process in the machine's memory.
        place: where the teacher is, and the others.
        other_teachers: those of a run with a teacher for each data set, besides `teacher`.
    """

    student: Blueprint
    teacher: Blueprint | None
    distillation: DistillationArguments | None
    batch_size: int
    length: int
    responses: float = 0.5
    accumulation: int = 1
    autocast: torch.dtype | None = None
    engine_dtype: torch.dtype | None = None
    optimizer: str = "adamw_torch_fused"
    devices: int = 1
    sharding: Sharding | None = None
    accelerator: bool = True
    place: TeacherPlace = TeacherPlace()
    other_teachers: tuple[Blueprint, ...] = ()


@dataclass(frozen=True)
class Sharding:
    """The part of a DeepSpeed configuration that decides about memory; defaults are DeepSpeed's. Sizes are elements.

    Attributes:
        stage: 0 to 3: nothing, optimizer states, gradients too, parameters too.
        offload_optimizer: whether optimizer states and gradients are in main memory.
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
