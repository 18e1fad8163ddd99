"""Tensors that seem to be on a GPU: shapes, types and devices are real, and whoever waits for the device is noted."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import llamafactory_sekd


PACKAGE, TORCH = Path(llamafactory_sekd.__file__).parent, Path(torch.__file__).parent
DEVICE = torch.device("cuda")


class Waits(TorchDispatchMode):
    """While entered, counts the places of the package that look at the content of a tensor there, and answers.

    A number is 0, and a selection takes every second entry.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            self._note(args[0])
            return False if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 0
        if func is aten.nonzero.default:
            self._note(args[0])
            return torch.zeros(args[0].numel() // 2, args[0].dim(), dtype=torch.int64, device=args[0].device)
        if func is aten.index.Tensor:
            args = (args[0], [numbers for index in args[1] for numbers in self._numbers(index)])
        return func(*args, **(kwargs or {}))

    def _numbers(self, index: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Return what a mask selects: a list of numbers for each of its dimensions."""
        if index is None or index.dtype != torch.bool:
            return [index]
        self._note(index)
        return [torch.zeros(index.numel() // 2, dtype=torch.int64, device=index.device) for _ in index.shape]

    def _note(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cuda":
            return
        files = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
        path, function = [place for place in files if TORCH not in place[0].parents and place[0] != Path(__file__)][-1]
        if PACKAGE in path.parents:
            self.places[f"{path.stem}.{function}"] += 1


def moved(module: nn.Module) -> nn.Module:
    """Put a module there, in place; to be called in fake-tensor mode."""
    made: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, value in tensors.items():
                if value is None:
                    continue
                if id(value) not in made:
                    empty = torch.empty(value.shape, dtype=value.dtype, device=DEVICE)
                    is_parameter = isinstance(value, nn.Parameter)
                    made[id(value)] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
                tensors[name] = made[id(value)]
    return module
