"""What is kept of the teacher for a response token: its hidden state (exact), or its largest probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

import torch

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.objectives import IDENTITY, LogitsSource, LogitTransform
from llamafactory_sekd.teacher.cache.record_store import Record
from llamafactory_sekd.teacher.model import Teacher
from llamafactory_sekd.teacher.source import product


DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# The logarithm of a probability that counts for nothing, and is still a number.
_NOTHING = -1e4
TOPK_RANGE = (8, 512)
# Integers of the same width: nothing on the way from file to device rounds or casts them.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def written_transform(transform: LogitTransform) -> dict[str, float | None] | None:
    """Return what a manifest or a server says of a teacher's logits; None where they are its head's products."""
    return None if transform == IDENTITY else asdict(transform)


def read_transform(written: dict[str, Any] | None) -> LogitTransform:
    """Read what :func:`written_transform` wrote."""
    return IDENTITY if written is None else LogitTransform(**written)


class Format(Protocol):
    """How records are made and read; see :data:`FORMATS`."""

    name: str

    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of what is kept for one token, by name."""

    def encode(self, teacher: Teacher, inputs: dict[str, Any], rows: torch.Tensor) -> Record:
        """One forward pass of the teacher: tensors ``[tokens, ...]`` for the response positions."""

    def decode(self, record: Record, head: Callable[[], Record], vocab_size: int | None) -> LogitsSource:
        """Return the logits that a record was made from, as far as it keeps them.

        Args:
            record: tensors ``[tokens, ...]`` with the names of the fields.
            head: gives the ``weight`` and ``bias`` of the teacher's head, where they are needed.
            vocab_size: of the common vocabulary; None for the teacher's own.
        """


class HiddenFormat:
    """The hidden states that the teacher's head reads; with the head next to them the logits are exact.

    Args:
        width: of the teacher.
        dtype: of what is kept: the teacher's own type loses nothing.
        transform: what the teacher does to the products of its head.
    """

    name = "hidden"

    def __init__(self, width: int, dtype: torch.dtype, transform: LogitTransform = IDENTITY) -> None:
        self.width = width
        self.dtype = dtype
        self.transform = transform

    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """``hidden`` ``[width]``."""
        return {"hidden": (self.dtype, (self.width,))}

    def encode(self, teacher: Teacher, inputs: dict[str, Any], rows: torch.Tensor) -> Record:
        """See :class:`Format`."""
        return {"hidden": teacher.hidden_states(inputs, rows).to(self.dtype)}

    def decode(self, record: Record, head: Callable[[], Record], vocab_size: int | None) -> LogitsSource:
        """See :class:`Format`."""
        parts = head()
        return product(record["hidden"], parts["weight"], parts.get("bias"), vocab_size, self.transform)


class TopKFormat:
    """The k largest probabilities, and the mass of all others, which is spread evenly over them when it is read.

    Args:
        k: how many are kept.
        dtype: of the log-probabilities; float16 keeps them to 1 part in 2,000.
        vocab_size: the ids that the tokenizer uses; the teacher's other rows are left out and it is renormalized.
    """

    name = "topk"

    def __init__(self, k: int, dtype: torch.dtype, vocab_size: int) -> None:
        low, high = TOPK_RANGE
        if not low <= k <= high or k >= vocab_size:
            raise ArgumentError(
                f"`--k {k}` cannot be used: keep {low} to {high} probabilities per token, "
                "fewer than the vocabulary has."
            )
        self.k = k
        self.dtype = dtype
        self.vocab_size = vocab_size
        self.id_type = torch.int16 if vocab_size <= 2**15 else torch.int32

    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """``ids`` and ``log_probs`` ``[k]``, ``log_tail`` ``[]``: the logarithm of the mass of all other ids."""
        return {
            "ids": (self.id_type, (self.k,)),
            "log_probs": (self.dtype, (self.k,)),
            "log_tail": (torch.float32, ()),
        }

    def encode(self, teacher: Teacher, inputs: dict[str, Any], rows: torch.Tensor) -> Record:
        """See :class:`Format`."""
        return self.compress(teacher.logits(inputs, rows))

    def decode(self, record: Record, head: Callable[[], Record], vocab_size: int | None) -> LogitsSource:
        """See :class:`Format`; the vocabulary is the format's own."""
        return TopKLogits(self, record)

    def compress(self, logits: torch.Tensor) -> Record:
        """Keep the largest probabilities of logits ``[tokens, vocab]``; the tail is summed, not subtracted."""
        logits = logits[:, : self.vocab_size].float()
        norm = logits.logsumexp(-1, keepdim=True)
        top, ids = logits.topk(self.k, dim=-1)
        log_tail = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - norm.squeeze(-1)
        return {"ids": ids.to(self.id_type), "log_probs": (top - norm).to(self.dtype), "log_tail": log_tail}


class TopKLogits:
    """The distributions that records stand for, as logits, written a few tokens at a time.

    The mass of the ids that were not kept is spread evenly over them.

    Args:
        kept: the format.
        record: tensors ``[tokens, ...]`` with the names of its fields.
    """

    dtype = torch.float32
    may_be_infinite = False

    def __init__(self, kept: TopKFormat, record: Record) -> None:
        self.vocab_size = kept.vocab_size
        self.ids = record["ids"]
        self.log_probs = record["log_probs"]
        self.even = record["log_tail"] - math.log(kept.vocab_size - kept.k)

    def __len__(self) -> int:
        return len(self.ids)

    def logits(self, tokens: slice | torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the logits of some tokens to the first rows of ``out``, ``[chunk, vocab]``, and return these rows."""
        ids = self.ids[tokens].long()
        out = out[: len(ids)]
        out.copy_(self.even[tokens].clamp_min(_NOTHING).unsqueeze(-1).expand_as(out))
        return out.scatter_(-1, ids, self.log_probs[tokens].to(out.dtype).clamp_min_(_NOTHING))


FORMATS: tuple[str, ...] = (HiddenFormat.name, TopKFormat.name)


def bytes_per_token(kept: Format) -> int:
    """Return what one response token takes on disk."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in kept.fields().values())


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same bytes as integers of the same width."""
    return tensor.view(_BITS[tensor.dtype.itemsize])
