"""A teacher whose answers come with the batch, and one that computes and keeps what is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.objectives import IDENTITY, LogitsSource
from llamafactory_sekd.ranks import on_any_rank
from llamafactory_sekd.teacher.cache.collator import FOUND, SEGMENTS, TOKENS, field_key
from llamafactory_sekd.teacher.cache.formats import HiddenFormat, TopKFormat, TopKLogits
from llamafactory_sekd.teacher.cache.record_store import Record, ShardWriter
from llamafactory_sekd.teacher.cache.several import OpenCache, unanswered
from llamafactory_sekd.teacher.mixture import MixedLogits
from llamafactory_sekd.teacher.model import Teacher
from llamafactory_sekd.teacher.source import Answers, product


HEAD = "head.safetensors"


def padding_of_head(cache: OpenCache, used: int) -> list[torch.Tensor]:
    """Return what a cache's head holds beyond the ids that the tokenizer uses; nothing where it has no head."""
    path = cache.directory / HEAD
    if isinstance(cache.kept, TopKFormat) or not path.is_file():
        return []
    with safe_open(path, framework="pt") as head:
        return [head.get_slice(name)[used:] for name in head.keys()]  # noqa: SIM118  # it is no mapping


class CachedTeacher:
    """Hands out what :class:`CacheCollator` put into the batch.

    Args:
        caches: those of the run; each is a teacher.
        device: where the batches are.
        describe: from the token ids of a sequence to its text, for messages.
        weights: of each cache's distribution where several hold an example; None where that is refused.
    """

    def __init__(
        self,
        caches: Sequence[OpenCache],
        device: torch.device,
        describe: Callable[[torch.Tensor], str],
        weights: Sequence[float] | None = None,
    ) -> None:
        self.caches = caches
        self.device = device
        self.describe = describe
        self.weights = weights
        self.names = tuple(cache.name for cache in caches) if len(caches) > 1 else ()
        fields = (field_key(number, name) for number, cache in enumerate(caches) for name in cache.kept.fields())
        self.collated_keys = (SEGMENTS, *fields)
        self._heads: dict[int, dict[str, torch.Tensor]] = {}

    def announce(self, batches: Sequence[dict[str, Any]]) -> None:
        """Do nothing: the answers are in the batch."""

    def can_answer_in_chunks(self, inputs: dict[str, Any]) -> bool:
        """Return true: hidden states are kept only where the head says the rest."""
        return True

    def logits(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Logits ``[tokens, vocab]``: exact for ``hidden``, with an even tail for ``topk``."""
        with self.answers(inputs, rows)(self._smallest_vocabulary()) as source:
            out = torch.empty(len(source), source.vocab_size, dtype=source.dtype, device=self.device)
            return source.logits(slice(None), out)

    def answers(self, inputs: dict[str, Any], rows: torch.Tensor) -> Answers:
        """Return what the batch brought; see :class:`TeacherSource`."""
        records = self._records(inputs, rows)
        if len(records) == 1:
            return lambda vocab_size: nullcontext(self._source(0, records[0], vocab_size))

        knows = self.who_answers(inputs, rows)

        def sources(vocab_size: int | None) -> LogitsSource:
            known = [self._source(number, record, vocab_size) for number, record in enumerate(records)]
            return MixedLogits(known, knows, self.weights)

        return lambda vocab_size: nullcontext(sources(vocab_size))

    def who_answers(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Which caches hold each response token, bool ``[tokens, caches]``."""
        table = _of_rows(inputs[SEGMENTS], rows).flatten(0, 1)
        return table[:, FOUND:].bool().repeat_interleave(table[:, TOKENS], dim=0)

    def _smallest_vocabulary(self) -> int | None:
        """Several heads are read as far as all of them reach; the trainer cuts to a smaller student's."""
        return None if len(self.caches) == 1 else min(cache.vocab_size for cache in self.caches)

    def _source(self, number: int, record: Record, vocab_size: int | None) -> LogitsSource:
        kept = self.caches[number].kept
        if isinstance(kept, TopKFormat):
            return TopKLogits(kept, record)

        if number not in self._heads:
            head = load_file(self.caches[number].directory / HEAD)
            self._heads[number] = {name: tensor.to(self.device) for name, tensor in head.items()}

        head = self._heads[number]
        transform = kept.transform if isinstance(kept, HiddenFormat) else IDENTITY
        return product(record["hidden"], head["weight"], head.get("bias"), vocab_size, transform)

    def _records(self, inputs: dict[str, Any], rows: torch.Tensor) -> list[Record]:
        table = _of_rows(inputs[SEGMENTS], rows)
        holders = table[..., FOUND:].sum(-1)
        wrong = (table[..., TOKENS] > 0) & ((holders == 0) | ((holders > 1) & (self.weights is None)))
        if bool(wrong.any()):
            sequence, segment = wrong.nonzero()[0].tolist()
            numbers = table[sequence, segment, FOUND:].nonzero().squeeze(-1).tolist()
            text = self.describe(inputs["input_ids"][sequence])
            raise TeacherError(unanswered([cache.directory for cache in self.caches], numbers, text))

        return self._collated(inputs, rows)

    def _collated(self, inputs: dict[str, Any], rows: torch.Tensor) -> list[Record]:
        table = _of_rows(inputs[SEGMENTS], rows)
        records = []
        for number, cache in enumerate(self.caches):
            counts = (table[..., TOKENS] * table[..., FOUND + number]).sum(-1)
            record = {}
            for name, (dtype, _) in cache.kept.fields().items():
                values = inputs[field_key(number, name)]
                filled = torch.arange(values.shape[1], device=values.device) < counts.unsqueeze(-1)
                record[name] = values[filled].view(dtype)
            records.append(record)

        return records


class FillingTeacher(CachedTeacher):
    """Asks the teacher itself for batches that the cache does not have completely, and keeps its answers.

    What it returns is what later epochs will read, rounded alike.

    Args:
        cache: the one that is filled; the collator reads from it, in this process.
        device, describe: see :class:`CachedTeacher`.
        online: the teacher.
        writer: of this rank.
    """

    def __init__(
        self,
        cache: OpenCache,
        device: torch.device,
        describe: Callable[[torch.Tensor], str],
        *,
        online: Teacher,
        writer: ShardWriter,
    ) -> None:
        super().__init__([cache], device, describe)
        self.cache = cache
        self.online = online
        self.writer = writer

    def flush(self) -> None:
        """Write what was computed since; the next epoch reads it."""
        self.writer.flush()
        self.cache.reader.refresh()

    def _records(self, inputs: dict[str, Any], rows: torch.Tensor) -> list[Record]:
        table = _of_rows(inputs[SEGMENTS], rows)
        lacking = (table[..., TOKENS] > 0) & (table[..., FOUND] == 0)
        if not on_any_rank(lacking.any()):
            return self._collated(inputs, rows)

        plain = {name: value for name, value in inputs.items() if name not in self.collated_keys}
        record = self.cache.kept.encode(self.online, plain, rows)
        start = 0
        for high, low, tokens, found in table[table[..., TOKENS] > 0].tolist():
            key, stop = (high, low), start + tokens
            if not found and key not in self.writer and key not in self.cache.reader:
                self.writer.add(key, {name: values[start:stop] for name, values in record.items()})
            start = stop

        return [record]


def _of_rows(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Clear what belongs to sequences without labels: those that only fill up the epoch's last batch."""
    return torch.cat([table[..., :TOKENS], table[..., TOKENS:] * rows.any(-1).to(table.dtype)[:, None, None]], dim=-1)
