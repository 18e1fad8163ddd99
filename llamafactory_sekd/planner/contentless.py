"""Models without content: shapes, types and lifetimes, and neither memory nor arithmetic; what they would take."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamafactory_sekd.planner.planned_run import Blueprint


def build_without_content(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model on the device ``meta``, where adapters can be added and parameters cast."""
    with torch.device("meta"):
        return build()


def to_fake(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn a model of the device ``meta`` into one that seems to be on the CPU; to be called in fake-tensor mode.

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


class LiveMemory(TorchDispatchMode):
    """While entered, knows how many bytes of tensors made under it are alive, and how many were at the peak.

    Attributes:
        peak: bytes by label at the moment when their sum was largest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak: Counter[str] = Counter()
        self._label = "activations"
        self._live: Counter[str] = Counter()
        self._total = 0
        self._largest = 0
        self._known: dict[int, tuple[str, int]] = {}  # storage -> label and bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)

        return result

    def ignore(self, tensor: torch.Tensor) -> None:
        """Leave a tensor that exists already out of the count (its views are outputs of operations)."""
        self._known[tensor.untyped_storage()._cdata] = ("", 0)

    def relabel(self, tensor: torch.Tensor, label: str) -> None:
        """From now on, count a tensor under another label."""
        key = tensor.untyped_storage()._cdata
        old, size = self._known.get(key, ("", 0))
        self._live[old] -= size
        self._live[label] += size
        self._known[key] = (label, size)

    @contextmanager
    def labeled(self, label: str) -> Iterator[None]:
        """For the duration, what is made counts under a label."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (self._label, size)
        self._live[self._label] += size
        self._total += size
        weakref.finalize(storage, self._drop, key)
        if self._total > self._largest:
            self._largest = self._total
            self.peak = self._live.copy()

    def _drop(self, key: int) -> None:
        label, size = self._known.pop(key)
        self._live[label] -= size
        self._total -= size


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
