"""What travels between a run and `sekd serve`: questions and the tokenizer as JSON, answers as safetensors bytes.

A question holds token ids and the positions that predict response tokens; an answer holds, for these positions one
after the other, the fields of a cache's record. So what arrives is what a cache keeps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load, save

from llamafactory_sekd.errors import ArgumentError, TeacherError
from llamafactory_sekd.fingerprints import xxh3, xxh3_of_json
from llamafactory_sekd.teacher.cache.formats import DTYPES, FORMATS, Format, HiddenFormat, TopKFormat, read_transform
from llamafactory_sekd.teacher.cache.record_store import Record
from llamafactory_sekd.teacher.cache.segments import Segment
from llamafactory_sekd.teacher.compatibility import SAMPLES, check_tokenizers


VERSION = 1
# Headers of an answer: its checksum, and whose answer it is.
CHECKSUM, FINGERPRINT = "X-Sekd-Xxh3", "X-Sekd-Teacher"
_SPECIAL = ("bos_token", "eos_token", "unk_token")


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of its teacher.

    Attributes:
        model: its name, for messages.
        rows, width: of its head.
        dtype: the type of its head's products, a key of ``DTYPES``: hidden states in it lose nothing.
        hidden: whether its logits are exactly its head times its hidden states, scaled or capped.
        max_length: tokens of a sequence, at most.
        max_k: log-probabilities per token, at most.
        teacher: what decides its answers, as a cache's manifest records it.
        software: the versions that compute it.
        head: size and checksum of the head's bytes; None where it is not sent.
        transform: how they are scaled or capped, as a cache's manifest records it; None for not at all.
        version: of the protocol.
    """

    model: str
    rows: int
    width: int
    dtype: str
    hidden: bool
    max_length: int
    max_k: int
    teacher: dict[str, Any] = field(default_factory=dict)
    software: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] | None = None
    transform: dict[str, Any] | None = None
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        """Return what is the same for the same weights, types and versions, and only for them."""
        return xxh3_of_json([self.teacher, self.software, self.dtype, self.rows])

    def hidden_format(self, dtype: str | None = None) -> HiddenFormat:
        """Return the format of its hidden states, in a type that loses nothing unless another is asked for."""
        return HiddenFormat(self.width, DTYPES[dtype or self.dtype], read_transform(self.transform))

    def to_json(self) -> dict[str, Any]:
        """Return its fields and its fingerprint."""
        content = {**asdict(self), "fingerprint": self.fingerprint}
        if self.transform is None:  # which clients of 0.1.0 do not know
            del content["transform"]
        return content

    @classmethod
    def of_json(cls, content: Any) -> ServerInfo:
        """Read :meth:`to_json`; :class:`ValueError` for anything else."""
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ValueError(f"speaks version {content.get('version') if isinstance(content, dict) else content!r}")
        known = {name: value for name, value in content.items() if name != "fingerprint"}
        try:
            info = cls(**known)
        except TypeError as error:
            raise ValueError(str(error)) from error

        if info.fingerprint != content.get("fingerprint"):
            raise ValueError("describes its teacher with a fingerprint that does not match")
        return info


class Asked(BaseModel):
    """A sequence: its ids, the runs [start, stop) of positions that predict a response token, its position ids."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ids: list[int] = Field(min_length=2)
    runs: list[list[int]] = Field(min_length=1)
    positions: list[int] | None = None


class Question(BaseModel):
    """What is asked of a server.

    Attributes:
        teacher: the fingerprint of the teacher that is meant.
        format, dtype, k, vocab_size: of the records; see :class:`TopKFormat` for the latter two.
        together: whether other questions may share the forward pass; alone, the answer is that of a local teacher to
            the bit.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    teacher: str
    format: str
    dtype: str
    k: int | None = None
    vocab_size: int | None = None
    together: bool = True
    sequences: list[Asked] = Field(min_length=1)

    def kept(self, info: ServerInfo) -> Format:
        """Return the format of the records.

        Raises:
            ArgumentError: the server's teacher cannot be asked for it.
        """
        if self.format not in FORMATS or self.dtype not in DTYPES:
            raise ArgumentError(
                f"format {self.format!r} with dtype {self.dtype!r} is unknown: use {', '.join(FORMATS)}"
            )
        if self.format == HiddenFormat.name:
            if not info.hidden:
                raise ArgumentError("this teacher's logits are more than its head's product: ask for topk")
            return info.hidden_format(self.dtype)
        if self.k is None or self.vocab_size is None or not 0 < self.vocab_size <= info.rows or self.k > info.max_k:
            raise ArgumentError(
                f"topk needs k up to {info.max_k} and a vocab_size up to {info.rows}, not {self.k} and "
                f"{self.vocab_size}"
            )
        return TopKFormat(self.k, DTYPES[self.dtype], self.vocab_size)

    def segments(self, info: ServerInfo) -> list[Segment]:
        """Return the sequences, checked.

        Raises:
            ArgumentError: one of them is too long, holds an id that the teacher does not know, or names no positions.
        """
        return [_segment(number, sequence, info) for number, sequence in enumerate(self.sequences)]


def _segment(number: int, sequence: Asked, info: ServerInfo) -> Segment:
    length = len(sequence.ids)
    if length > info.max_length:
        raise ArgumentError(f"sequence {number} has {length} tokens and this teacher reads up to {info.max_length}")
    low, high = min(sequence.ids), max(sequence.ids)
    if low < 0 or high >= info.rows:
        raise ArgumentError(
            f"sequence {number} holds the token id {low if low < 0 else high}: use 0 to {info.rows - 1}"
        )
    rows, end = np.zeros(length, dtype=bool), 0
    for run in sequence.runs:
        if len(run) != 2 or not end <= run[0] < run[1] < length:
            raise ArgumentError(
                f"sequence {number} has the run {run}: use [start, stop) in order, within its {length - 1} positions "
                "that have a next token"
            )
        rows[run[0] : run[1]] = True
        end = run[1]

    positions = None
    if sequence.positions is not None:
        if len(sequence.positions) != length or not 0 <= min(sequence.positions) <= max(sequence.positions) < 2**31:
            raise ArgumentError(f"sequence {number} has {len(sequence.positions)} positions for {length} tokens")
        positions = np.asarray(sequence.positions, dtype=np.int32)

    return Segment(np.asarray(sequence.ids, dtype=np.int32), rows, positions)


def question_of(parts: Sequence[Segment], kept: Format, fingerprint: str, *, together: bool) -> bytes:
    """Return the bytes of a question about some segments."""
    settings: dict[str, Any] = {"format": kept.name}
    if isinstance(kept, TopKFormat):
        settings |= {"dtype": _name_of(kept.dtype), "k": kept.k, "vocab_size": kept.vocab_size}
    elif isinstance(kept, HiddenFormat):
        settings |= {"dtype": _name_of(kept.dtype)}

    sequences = [
        {
            "ids": part.ids.tolist(),
            "runs": runs_of(part.rows),
            **({} if part.positions is None else {"positions": part.positions.tolist()}),
        }
        for part in parts
    ]
    content = {"teacher": fingerprint, **settings, "together": together, "sequences": sequences}
    return json.dumps(content, separators=(",", ":")).encode()


def runs_of(rows: np.ndarray) -> list[list[int]]:
    """Return where ``[length]`` bool is true, as runs [start, stop)."""
    edges = np.flatnonzero(np.diff(rows, prepend=False, append=False)).tolist()
    return [[start, stop] for start, stop in list(pairwise(edges))[::2]]


def answer_of(records: Record) -> tuple[bytes, str]:
    """Return the bytes of an answer and their checksum."""
    data = save({name: values.contiguous().cpu() for name, values in records.items()})
    return data, xxh3(data)


class GarbageError(TeacherError):
    """An answer is not what was asked for."""


def read_answer(data: bytes, checksum: str | None, kept: Format, tokens: int) -> Record:
    """Return the records of an answer.

    Args:
        data, checksum: the bytes and what the server says of them.
        kept: what was asked for.
        tokens: the response tokens that were asked about.

    Raises:
        GarbageError: the bytes are something else.
    """
    if checksum != xxh3(data):
        raise GarbageError(f"its {len(data):,} bytes do not match their checksum")
    try:
        records = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise GarbageError("its bytes are no safetensors") from error

    fields = kept.fields()
    if records.keys() != fields.keys():
        raise GarbageError(f"it holds {sorted(records)} and not {sorted(fields)}")
    for name, (dtype, shape) in fields.items():
        found = records[name]
        if found.dtype != dtype or tuple(found.shape) != (tokens, *shape):
            raise GarbageError(f"its {name} is {found.dtype} {list(found.shape)} and not {dtype} {[tokens, *shape]}")

    return records


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(tokenizer: Any) -> dict[str, Any]:
    """Return the vocabulary, the special tokens and what becomes of the samples."""
    return {
        "vocabulary": tokenizer.get_vocab(),
        "special": {name: getattr(tokenizer, name, None) for name in _SPECIAL},
        "samples": [tokenizer.encode(text, add_special_tokens=False) for text in SAMPLES],
    }


class DescribedTokenizer:
    """What :func:`describe` said, with the methods that ``check_tokenizers`` calls."""

    def __init__(self, description: dict[str, Any]) -> None:
        self._vocabulary = {str(token): int(number) for token, number in description["vocabulary"].items()}
        self._tokens = {number: token for token, number in self._vocabulary.items()}
        self._samples = [[int(number) for number in ids] for ids in description["samples"]]
        self.bos_token, self.eos_token, self.unk_token = (description["special"].get(name) for name in _SPECIAL)

    def get_vocab(self) -> dict[str, int]:
        """Return token to id."""
        return self._vocabulary

    def encode(self, text: str, **_: Any) -> list[int]:
        """Return the ids of one of the samples."""
        return self._samples[SAMPLES.index(text)]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Return the tokens of some ids."""
        return [self._tokens.get(number, "?") for number in ids]


def check_served_tokenizer(student: Any, description: dict[str, Any], url: str) -> None:
    """Check that the server's tokenizer is the student's, after the run's template has acted on the student's.

    Raises:
        TeacherError: it is another one.
    """
    try:
        teacher = DescribedTokenizer(description)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TeacherError(f"`teacher_server: {url}` describes its tokenizer in a way that cannot be read.") from error

    # The server knows no template. A chat template writes its end token into the student's tokenizer; the texts end
    # with that one, and the vocabularies are compared token by token anyway.
    if teacher.get_vocab().get(student.eos_token) == student.eos_token_id:
        teacher.eos_token = student.eos_token
    check_tokenizers(student, teacher)
