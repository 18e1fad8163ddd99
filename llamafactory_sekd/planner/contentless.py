"""Models without content: shapes and types, and neither memory nor arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


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


class AnswerQuestions(TorchDispatchMode):
    """While entered, whoever asks for a tensor's content gets an answer, as if it were zero, and all of it selected.

    So code that looks for NaN finds none, and code that takes the tokens with a property takes all of them.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer, or run the operation."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 0

        if func is torch.ops.aten.nonzero.default:
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64)

        return func(*args, **(kwargs or {}))
