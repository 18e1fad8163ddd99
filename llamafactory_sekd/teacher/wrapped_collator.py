"""A collator around the host's: what a teacher needs of a batch's examples travels with the batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any


Collate = Callable[[list[dict[str, Any]]], Any]


class WrappedCollator(ABC):
    """Wraps a collator, in the workers of the data loader too.

    Args:
        collate: the host's collator; it may change the features, so what a subclass takes from them it takes before.
    """

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __getattr__(self, name: str) -> Any:
        # The host asks its collator for the template and the like. While a worker unpickles one, `collate` is not set.
        if name.startswith("__") or name == "collate":
            raise AttributeError(name)
        return getattr(self.collate, name)

    @abstractmethod
    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Collate as the host does, and add the teacher's entries."""
