"""Reading in training: the caches of a run, their records in its batches, and the teacher that answers with them."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.objectives import LogitsSource
from llamafactory_sekd.ranks import on_any_rank
from llamafactory_sekd.teacher.cache.cache_manifest import HEAD, Manifest
from llamafactory_sekd.teacher.cache.formats import Format, TopKFormat, as_bits
from llamafactory_sekd.teacher.cache.record_store import Record, ShardReader, ShardWriter
from llamafactory_sekd.teacher.cache.segments import Key, Segment, segments, segments_of_each
from llamafactory_sekd.teacher.model import Teacher
from llamafactory_sekd.teacher.source import Answers, Collate, MixedLogits, TeacherSource, WrappedCollator, every_logit


# Of an example's text, in a message of one line.
_SHOWN = 120
PREFIX = "teacher_"
SEGMENTS = "teacher_segments"
# Columns of SEGMENTS, after the two halves of the key; from the last one on there is one for every cache.
TOKENS, FOUND = 2, 3


@dataclass(frozen=True)
class OpenCache:
    """A cache that a run reads.

    Attributes:
        directory: its folder.
        name: of its teacher, in the metrics.
        kept: its format.
        vocab_size: how many ids its teacher's answers are over.
        reader: of its records.
    """

    directory: Path
    name: str
    kept: Format
    vocab_size: int
    reader: ShardReader


def names_of(directories: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart, their parts joined by hyphens."""
    parts = [path.absolute().parts for path in directories]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["-".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names

    raise TeacherError(f"`teacher_cache: {','.join(map(str, directories))}` names a folder twice: remove one.")


def open_caches(directories: Sequence[Path], manifests: Sequence[Manifest]) -> list[OpenCache]:
    """Open caches that were checked, by their manifests; :class:`TeacherError` where a folder is named twice."""
    return [
        OpenCache(directory, name, manifest.kept(), manifest.vocab_size, ShardReader(directory))
        for directory, name, manifest in zip(directories, names_of(directories), manifests, strict=True)
    ]


def first_unanswered(
    datasets: Sequence[Any], known: Sequence[Container[Key]], *, mixes: bool = False
) -> tuple[Segment, list[int]] | None:
    """Return the first segment that no cache holds, or several do, with the numbers of those; None for none.

    Args:
        datasets: of tokenized examples.
        known: the keys of each cache.
        mixes: whether several answers are allowed.
    """
    for dataset in datasets:
        for example in dataset:
            for segment in segments(example):
                key = segment.key()
                holders = [number for number, keys in enumerate(known) if key in keys]
                if not holders or (len(holders) > 1 and not mixes):
                    return segment, holders

    return None


def unanswered(directories: Sequence[Path], holders: Sequence[int], text: str) -> str:
    """Return the message for an example that no cache holds, or several do.

    Args:
        directories: of the run's caches.
        holders: the numbers of those that hold it.
        text: of the example.
    """
    text = " ".join(text.split())
    shown = repr(text if len(text) <= _SHOWN else f"… {text[-_SHOWN:]}")
    if len(holders) > 1:
        names = " and ".join(f"`{directories[number]}`" for number in holders)
        return (
            f"`teacher_cache`: {names} hold the example {shown}, and each would answer it: set `teacher_mix: mean` to "
            "train on the mean of their distributions, or name one of them."
        )
    remedy = (
        "or name the teacher under `teacher_model` as well" if len(directories) == 1 else "into one of the folders"
    )
    return (
        f"`teacher_cache: {','.join(map(str, directories))}` lacks the example {shown}: run `sekd cache` with this "
        f"YAML to add what is missing, {remedy}."
    )


def field_key(cache: int, name: str) -> str:
    """Return the name that a field of the run's cache of that number has in a batch."""
    return f"{PREFIX}{cache}_{name}"


class CacheCollator(WrappedCollator):
    """Wraps a collator: it adds what the caches hold for the batch, in the workers of the data loader.

    A batch gains ``teacher_segments`` ``[batch, segments, 3 + caches]`` int64 (key, response tokens, whether each
    cache has it) and for every field of a cache's format ``teacher_<cache>_<field>`` ``[batch, tokens, ...]``, the
    field's bytes as integers: of each sequence the tokens that the cache has, one after the other, then zeros.

    Args:
        collate: the host's collator; it may change the features, so keys are taken before it runs.
        caches: those of the run.
    """

    def __init__(self, collate: Collate, caches: Sequence[OpenCache]) -> None:
        super().__init__(collate)
        self.caches = caches

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Collate as the host does and add the records."""
        sequences = segments_of_each(features)
        batch = self.collate(features)
        batch.update(self._records(sequences))
        return batch

    def _records(self, sequences: Sequence[Sequence[Segment]]) -> dict[str, torch.Tensor]:
        columns = max(map(len, sequences), default=0)
        table = torch.zeros(len(sequences), columns, FOUND + len(self.caches), dtype=torch.int64)
        for row, parts in enumerate(sequences):
            for column, part in enumerate(parts):
                table[row, column, :FOUND] = torch.tensor([*part.key(), part.tokens])

        batch = {SEGMENTS: table}
        found = [[self._read(part.key()) for part in parts] for parts in sequences]
        for number, cache in enumerate(self.caches):
            records = [[everywhere[number] for everywhere in parts] for parts in found]
            for row, of_row in enumerate(records):
                is_found = [record is not None for record in of_row]
                table[row, : len(of_row), FOUND + number] = torch.tensor(is_found, dtype=torch.int64)

            stacked = _stacked(records, table[..., TOKENS], cache)
            batch.update({field_key(number, name): values for name, values in stacked.items()})

        return batch

    def _read(self, key: Key) -> list[Record | None]:
        """Return what each cache holds of a segment."""
        records = [cache.reader.read(key) for cache in self.caches]
        if all(record is None for record in records):  # another rank, or this one, may have written it since
            records = [cache.reader.read(key) if cache.reader.refresh() else None for cache in self.caches]

        return records


def _stacked(found: Sequence[Sequence[Record | None]], tokens: torch.Tensor, cache: OpenCache) -> Record:
    """Write the records that there are one after the other, a row for each sequence."""
    counts = [
        sum(int(tokens[row, column]) for column, record in enumerate(records) if record is not None)
        for row, records in enumerate(found)
    ]
    tensors = {
        name: as_bits(torch.zeros(len(found), max(counts, default=0), *shape, dtype=dtype))
        for name, (dtype, shape) in cache.kept.fields().items()
    }
    for row, records in enumerate(found):
        start = 0
        for column, record in enumerate(records):
            if record is None:
                continue
            stop = start + int(tokens[row, column])
            for name, values in record.items():
                tensors[name][row, start:stop] = as_bits(values)
            start = stop

    return tensors


def padding_of_head(cache: OpenCache, used: int) -> list[torch.Tensor]:
    """Return what a cache's head holds beyond the ids that the tokenizer uses; nothing where it has no head."""
    path = cache.directory / HEAD
    if isinstance(cache.kept, TopKFormat) or not path.is_file():
        return []
    with safe_open(path, framework="pt") as head:
        return [head.get_slice(name)[used:] for name in head.keys()]  # noqa: SIM118  # it is no mapping


class CachedTeacher(TeacherSource):
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

    def can_answer_in_chunks(self, inputs: dict[str, Any]) -> bool:
        """Return true: hidden states are kept only where the head says the rest."""
        return True

    def logits(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Logits ``[tokens, vocab]``: exact for ``hidden``, with an even tail for ``topk``."""
        with self.answers(inputs, rows)(self._smallest_vocabulary()) as source:
            return every_logit(source, self.device)

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
        def head() -> Record:
            if number not in self._heads:
                found = load_file(self.caches[number].directory / HEAD)
                self._heads[number] = {name: tensor.to(self.device) for name, tensor in found.items()}
            return self._heads[number]

        return self.caches[number].kept.decode(record, head, vocab_size)

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
