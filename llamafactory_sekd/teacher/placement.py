"""Placement of a frozen teacher: with the student, sharded as it is, on a device of its own, or in main memory."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import cpu_offload
from torch import nn


# Parts of a DeepSpeed configuration that a model without an optimizer has no use for.
_OF_TRAINING = ("optimizer", "scheduler", "gradient_clipping", "data_efficiency", "curriculum_learning")
# Parts that DeepSpeed insists on, or that both engines must agree on.
_OF_THE_RUN = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_TYPES = ("bf16", "fp16")


@dataclass(frozen=True)
class Placement:
    """Placement of a teacher.

    Attributes:
        device: the device of its own, None where it shares the student's.
        offload: whether its weights rest in main memory between forward passes.
        engine: the DeepSpeed configuration that the user wrote for it, None for one derived from the student's.
    """

    device: torch.device | None = None
    offload: bool = False
    engine: Mapping[str, Any] | None = None


def engine_config(student: Mapping[str, Any], own: Mapping[str, Any] | None, offload: bool) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a teacher's engine.

    Args:
        student: the configuration of the student's engine, its batch sizes filled in.
        own: the configuration that the user wrote for the teacher; None to derive it from the student's.
        offload: whether parameters that are sharded rest in main memory.

    Returns:
        A configuration without what belongs to training. Stage 3 stays; the others, which shard what belongs to an
        optimizer, become 0.
    """
    config = deepcopy(dict(student if own is None else own))
    for key in _OF_TRAINING:
        config.pop(key, None)

    config.update({key: student[key] for key in _OF_THE_RUN if key in student})
    for key in _TYPES:
        if config.get(key, {}).get("enabled", "auto") == "auto" and key in student:
            config[key] = deepcopy(student[key])

    zero = config.setdefault("zero_optimization", {})
    zero.pop("offload_optimizer", None)
    if zero.get("stage", 0) != 3:
        zero["stage"] = 0
    elif offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}

    return config


def place(model: nn.Module, head: nn.Module, accelerator: Any, placement: Placement) -> nn.Module:
    """Place and shard a frozen model; what is not said otherwise is as the student's.

    Args:
        model: the model, loaded.
        head: its head, which is read outside of forward passes as well.
        accelerator: the trainer's.
        placement: where it shall stand.
    """
    if is_quantized(model):  # bitsandbytes has put it on its device already
        return model

    is_apart = placement.device is not None or placement.offload
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        config = engine_config(plugin.deepspeed_config, placement.engine, placement.offload)
        if config["zero_optimization"]["stage"] == 3 or not is_apart:
            import deepspeed

            return deepspeed.initialize(model=model, config=config)[0]

    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return _shard_by_fsdp(model, accelerator)

    if not is_apart:
        return accelerator.prepare_model(model, evaluation_mode=True)

    device = placement.device or accelerator.device
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    if not placement.offload:
        return model.to(device)

    # A rank without an accelerator is called `cpu:0`, which its tensors' device is not equal to.
    _rest_in_main_memory(model, head, torch.device("cpu") if device.type == "cpu" else device)
    return model


def is_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes keeps its weights in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))


def is_flat(model: nn.Module) -> bool:
    """FSDP1 keeps parameters in one flat tensor, which is gathered only inside of a forward pass."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(model, FullyShardedDataParallel)


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of a placed model needs all ranks (ZeRO-3, FSDP)."""
    from torch.distributed.tensor import DTensor

    of_parameters = any(hasattr(part, "ds_id") or isinstance(part, DTensor) for part in model.parameters())
    return of_parameters or is_flat(model)


def _shard_by_fsdp(model: nn.Module, accelerator: Any) -> nn.Module:
    if getattr(accelerator, "is_fsdp2", False):
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)

    from trl.models.utils import prepare_fsdp

    return prepare_fsdp(model, accelerator)


def _rest_in_main_memory(module: nn.Module, head: nn.Module, device: torch.device) -> None:
    """Let accelerate fetch the weights of each layer for its forward pass; the head alone stays on the device.

    Hooks on the head would get in the way of :func:`llamafactory_sekd.lm_head.replaced_forward`.
    """
    for child in module.children():
        if child is head:
            child.to(device)
        elif any(part is head for part in child.modules()):
            _rest_in_main_memory(child, head, device)
        else:
            cpu_offload(child, execution_device=device)
