"""Reading: the records of a batch's examples travel with the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llamafactory_sekd.teacher.cache.formats import Format, as_bits
from llamafactory_sekd.teacher.cache.segments import Segment, is_teacher_forced, segments
from llamafactory_sekd.teacher.cache.store import Record, ShardReader


PREFIX = "teacher_"
SEGMENTS = "teacher_segments"
# The columns of SEGMENTS.
HIGH, LOW, TOKENS, FOUND = range(4)


class CacheCollator:
    """Wraps a collator: it adds what the cache holds for the batch, in the workers of the data loader.

    A batch gains ``teacher_segments`` ``[batch, segments, 4]`` int64 (key, response tokens, whether the cache has it)
    and for every field of the format ``teacher_<field>`` ``[batch, response tokens, ...]``, the field's bytes as
    integers, zero where a sequence has fewer tokens or the cache lacks them.

    Args:
        collate: the host's collator; it may change the features, so keys are taken before it runs.
        reader: of the cache.
        kept: the cache's format.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any], reader: ShardReader, kept: Format) -> None:
        self.collate = collate
        self.reader = reader
        self.kept = kept

    def __getattr__(self, name: str) -> Any:
        # The host asks its collator for the template and the like.
        if name.startswith("__") or name == "collate":
            raise AttributeError(name)
        return getattr(self.collate, name)

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Collate as the host does and add the records."""
        found = [segments(feature) if is_teacher_forced(feature) else [] for feature in features]
        batch = self.collate(features)
        batch.update(self._records(found))
        return batch

    def _records(self, sequences: Sequence[Sequence[Segment]]) -> dict[str, torch.Tensor]:
        table = torch.zeros(len(sequences), max(map(len, sequences), default=0), 4, dtype=torch.int64)
        longest = max((sum(part.tokens for part in parts) for parts in sequences), default=0)
        tensors = {
            name: as_bits(torch.zeros(len(sequences), longest, *shape, dtype=dtype))
            for name, (dtype, shape) in self.kept.fields().items()
        }
        for row, parts in enumerate(sequences):
            start = 0
            for column, part in enumerate(parts):
                key, stop = part.key(), start + part.tokens
                record = self._read(key)
                table[row, column] = torch.tensor([*key, part.tokens, record is not None])
                for name, values in (record or {}).items():
                    tensors[name][row, start:stop] = as_bits(values)
                start = stop

        return {SEGMENTS: table, **{PREFIX + name: values for name, values in tensors.items()}}

    def _read(self, key: tuple[int, int]) -> Record | None:
        record = self.reader.read(key)
        if record is None and self.reader.refresh():  # another rank, or this one, may have written it since
            record = self.reader.read(key)

        return record
