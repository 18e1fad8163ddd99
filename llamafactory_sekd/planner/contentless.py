"""Models without content: shapes and types, and neither memory nor arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def build_without_content(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model on the device ``meta``, where adapters can be added and parameters cast."""
    with torch.device("meta"):
        return build()


def to_fake(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn a model of the device ``meta`` into one that seems to lie on the CPU; to be called in fake-tensor mode.

    On ``meta`` itself, attention would take a kernel that no device takes.

    Args:
        model: changed in place; shared parameters stay shared.
        dtype: the type that parameters get, None for their own.
    """
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            is_parameter = isinstance(tensor, nn.Parameter)
            empty = torch.empty(tensor.shape, dtype=dtype if dtype and is_parameter else tensor.dtype, device="cpu")
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty

        return made[id(tensor)]

    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for attributes in places:
            for name, value in attributes.items():
                if isinstance(value, torch.Tensor):
                    attributes[name] = fake(value)

    return model
