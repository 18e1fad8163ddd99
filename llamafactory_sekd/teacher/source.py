"""What the trainer asks of a teacher, wherever its answers come from, and the batches that bring what it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from llamafactory_sekd.objectives import IDENTITY, Head, LogitsSource, LogitTransform, product_type


Answers = Callable[[int | None], AbstractContextManager[LogitsSource]]


class TeacherSource(Protocol):
    """A teacher that is computed now, or read from a cache. The defaults are those of one alone that needs no notice.

    Attributes:
        collated_keys: entries of a batch that are the teacher's alone; the student must not see them.
        names: of the teachers that this one consists of; none where it is one alone.
    """

    collated_keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def announce(self, batches: Sequence[dict[str, Any]]) -> None:
        """Take note of batches, labels included, that :meth:`answers` will be asked about; they may gain entries."""
        return

    def can_answer_in_chunks(self, inputs: dict[str, Any]) -> bool:
        """Whether :meth:`answers` works: the logits of a few tokens can be had without those of all."""

    def logits(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Teacher logits ``[tokens, vocab]`` at the response positions.

        Args:
            inputs: the batch as it was collated, without labels.
            rows: ``[batch, length]`` bool, from :func:`llamafactory_sekd.objectives.response_positions`.
        """

    def answers(self, inputs: dict[str, Any], rows: torch.Tensor) -> Answers:
        """Compute or fetch what the teacher has to say on the response positions.

        Returns:
            A function from the size of the common vocabulary (None for the teacher's own) to a context in which the
            logits can be read, a few tokens at a time; a sharded head is gathered inside of it.
        """

    def who_answers(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Return which of the teachers in `names` have a say on each response token, bool ``[tokens, names]``."""
        return rows.new_empty(int(rows.sum()), 0)


def every_logit(source: LogitsSource, device: torch.device | None = None) -> torch.Tensor:
    """Return the logits of all tokens at once, ``[tokens, vocab]``."""
    out = torch.empty(len(source), source.vocab_size, dtype=source.dtype, device=device)
    return source.logits(slice(None), out)


def product(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vocab_size: int | None,
    transform: LogitTransform = IDENTITY,
) -> LogitsSource:
    """Logits as products of hidden states ``[tokens, width]`` with a head, over its first ``vocab_size`` rows."""
    used = len(weight) if vocab_size is None else vocab_size
    return Head(hidden, weight, bias, used, product_type(weight), transform)


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
