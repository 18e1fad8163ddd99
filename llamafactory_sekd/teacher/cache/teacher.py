"""A teacher whose answers come with the batch, and one that computes and keeps what is missing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.objectives import LogitsSource
from llamafactory_sekd.ranks import on_any_rank
from llamafactory_sekd.teacher.cache.collator import FOUND, PREFIX, SEGMENTS, TOKENS
from llamafactory_sekd.teacher.cache.formats import Format, TopKFormat, TopKLogits
from llamafactory_sekd.teacher.cache.store import Record, ShardReader, ShardWriter
from llamafactory_sekd.teacher.model import Teacher
from llamafactory_sekd.teacher.source import Answers, product


HEAD = "head.safetensors"
# Of a missing example's text, in a message of one line.
_SHOWN = 120


class CachedTeacher:
    """Hands out what :class:`CacheCollator` put into the batch.

    Args:
        directory: of the cache.
        kept: its format.
        device: where the batches are.
        describe: from the token ids of a sequence to its text, for messages.
    """

    def __init__(
        self, directory: Path, kept: Format, device: torch.device, describe: Callable[[torch.Tensor], str]
    ) -> None:
        self.directory = directory
        self.kept = kept
        self.device = device
        self.describe = describe
        self.collated_keys = (SEGMENTS, *(PREFIX + name for name in kept.fields()))
        self._head: dict[str, torch.Tensor] | None = None

    def can_answer_in_chunks(self, inputs: dict[str, Any]) -> bool:
        """Return true: hidden states are kept only where the head says the rest."""
        return True

    def logits(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Logits ``[tokens, vocab]``: exact for ``hidden``, with an even tail for ``topk``."""
        source = self._source(self._records(inputs, rows), None)
        out = torch.empty(len(source), source.vocab_size, dtype=source.dtype, device=self.device)
        return source.logits(slice(None), out)

    def answers(self, inputs: dict[str, Any], rows: torch.Tensor) -> Answers:
        """Return what the batch brought; see :class:`TeacherSource`."""
        records = self._records(inputs, rows)
        return lambda vocab_size: nullcontext(self._source(records, vocab_size))

    def _source(self, records: Record, vocab_size: int | None) -> LogitsSource:
        if isinstance(self.kept, TopKFormat):
            return TopKLogits(self.kept, records)

        if self._head is None:
            head = load_file(self.directory / HEAD)
            self._head = {name: tensor.to(self.device) for name, tensor in head.items()}

        return product(records["hidden"], self._head["weight"], self._head.get("bias"), vocab_size)

    def _records(self, inputs: dict[str, Any], rows: torch.Tensor) -> Record:
        table = inputs[SEGMENTS]
        lacking = (table[..., TOKENS] > 0) & (table[..., FOUND] == 0)
        if bool(lacking.any()):
            sequence = int(lacking.any(-1).nonzero()[0])
            raise TeacherError(missing_example(self.directory, self.describe(inputs["input_ids"][sequence])))

        return self._collated(inputs)

    def _collated(self, inputs: dict[str, Any]) -> Record:
        counts = inputs[SEGMENTS][..., TOKENS].sum(-1)
        result = {}
        for name, (dtype, _) in self.kept.fields().items():
            values = inputs[PREFIX + name]
            filled = torch.arange(values.shape[1], device=values.device) < counts.unsqueeze(-1)
            result[name] = values[filled].view(dtype)

        return result


class FillingTeacher(CachedTeacher):
    """Asks the teacher itself for batches that the cache does not have whole, and keeps its answers.

    What it hands out is what later epochs will read, rounded alike.

    Args:
        directory, kept, device, describe: see :class:`CachedTeacher`.
        online: the teacher.
        writer: of this rank.
        reader: the one that the collator reads from, in this process.
    """

    def __init__(
        self,
        directory: Path,
        kept: Format,
        device: torch.device,
        describe: Callable[[torch.Tensor], str],
        *,
        online: Teacher,
        writer: ShardWriter,
        reader: ShardReader,
    ) -> None:
        super().__init__(directory, kept, device, describe)
        self.online = online
        self.writer = writer
        self.reader = reader

    def flush(self) -> None:
        """Write what was computed since; the next epoch reads it."""
        self.writer.flush()
        self.reader.refresh()

    def _records(self, inputs: dict[str, Any], rows: torch.Tensor) -> Record:
        table = inputs[SEGMENTS]
        lacking = (table[..., TOKENS] > 0) & (table[..., FOUND] == 0)
        if not on_any_rank(lacking.any()):
            return self._collated(inputs)

        plain = {name: value for name, value in inputs.items() if name not in self.collated_keys}
        records = self.kept.encode(self.online, plain, rows)
        start = 0
        for high, low, tokens, found in table[table[..., TOKENS] > 0].tolist():
            key, stop = (high, low), start + tokens
            if not found and key not in self.writer and key not in self.reader:
                self.writer.add(key, {name: values[start:stop] for name, values in records.items()})
            start = stop

        return records


def missing_example(directory: Path, text: str) -> str:
    """Return the message for an example that the cache lacks."""
    text = " ".join(text.split())
    shown = text if len(text) <= _SHOWN else f"… {text[-_SHOWN:]}"
    return (
        f"`teacher_cache: {directory}` lacks the example {shown!r}: run `sekd cache` with this YAML to add what is "
        "missing, or name the teacher under `teacher_model` as well."
    )
