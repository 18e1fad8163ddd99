"""Counts the memory of the tensors that exist, operation by operation, by what they are for."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
