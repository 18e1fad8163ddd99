"""Reading: the records of a batch's examples travel with the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llamafactory_sekd.teacher.cache.formats import as_bits
from llamafactory_sekd.teacher.cache.record_store import Key, Record
from llamafactory_sekd.teacher.cache.segments import Segment, is_teacher_forced, segments
from llamafactory_sekd.teacher.cache.several import OpenCache
from llamafactory_sekd.teacher.wrapped_collator import Collate, WrappedCollator


PREFIX = "teacher_"
SEGMENTS = "teacher_segments"
# The columns of SEGMENTS; from the last one on there is one for every cache.
HIGH, LOW, TOKENS, FOUND = range(4)


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
        sequences = [segments(feature) if is_teacher_forced(feature) else [] for feature in features]
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
        found = self._found(sequences)
        for number, cache in enumerate(self.caches):
            records = [[everywhere[number] for everywhere in parts] for parts in found]
            for row, of_row in enumerate(records):
                is_found = [record is not None for record in of_row]
                table[row, : len(of_row), FOUND + number] = torch.tensor(is_found, dtype=torch.int64)

            stacked = _stacked(records, table[..., TOKENS], cache)
            batch.update({field_key(number, name): values for name, values in stacked.items()})

        return batch

    def _found(self, sequences: Sequence[Sequence[Segment]]) -> list[list[list[Record | None]]]:
        """Return what each cache holds of each segment."""
        return [[self._read(part.key()) for part in parts] for parts in sequences]

    def _read(self, key: Key) -> list[Record | None]:
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
