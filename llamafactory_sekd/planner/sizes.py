"""The sizes of a model's parts, in bytes and elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from llamafactory_sekd.planner.planned_run import Blueprint


# bitsandbytes: one scale per block of 64 weights, in float32 or, quantized again, in 8 bits and a scale per 256.
_SCALE_4_BIT = {False: 4 / 64, True: (1 + 4 / 256) / 64}


@dataclass(frozen=True)
class ModelSize:
    """Sizes of one model.

    Attributes:
        parameters, trainable: numbers of parameters.
        bytes: of all parameters as they are kept.
        trainable_bytes: of the trainable ones.
        largest_leaf: parameters of the largest single layer.
        largest_trainable: of the largest trainable tensor.
        head: parameters of the language-model head.
        item_size: bytes of a parameter while it is computed with.
    """

    parameters: int
    trainable: int
    bytes: int
    trainable_bytes: int
    largest_leaf: int
    largest_trainable: int
    head: int
    item_size: int


def size_of(model: nn.Module, blueprint: Blueprint) -> ModelSize:
    """Measure a model, whose tensors may be without content."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in trainable),
        bytes=sum(parameter.nbytes for parameter in parameters) - _saved_by_quantization(model, head, blueprint),
        trainable_bytes=sum(parameter.nbytes for parameter in trainable),
        largest_leaf=max(
            sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module in model.modules()
        ),
        largest_trainable=max((parameter.numel() for parameter in trainable), default=0),
        head=head.weight.numel(),
        item_size=head.weight.itemsize,
    )


def total_size(sizes: Sequence[ModelSize]) -> ModelSize:
    """Return the size of frozen models that are kept together and compute one after the other."""
    largest = max(sizes, key=lambda size: size.largest_leaf)
    sums = {
        key: sum(getattr(size, key) for size in sizes)
        for key in ("parameters", "trainable", "bytes", "trainable_bytes", "head")
    }
    return replace(largest, **sums)


def _saved_by_quantization(model: nn.Module, head: nn.Module, blueprint: Blueprint) -> int:
    if blueprint.quantization_bit is None:
        return 0

    scales = _SCALE_4_BIT[blueprint.double_quantization] if blueprint.quantization_bit == 4 else 0
    kept = blueprint.quantization_bit / 8 + scales
    weights = (
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    )
    return sum(int(weight.numel() * (weight.itemsize - kept)) for weight in weights)
