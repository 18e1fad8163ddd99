"""What the planner has to know of a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.planner.sharding import Sharding


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
