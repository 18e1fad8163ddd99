"""One pass of the teacher over the data: what is missing, in which batches, and the pass itself."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llamafactory_sekd.teacher.cache.formats import Format
from llamafactory_sekd.teacher.cache.informed import questions
from llamafactory_sekd.teacher.cache.record_store import Key, ShardWriter
from llamafactory_sekd.teacher.cache.segments import Segment
from llamafactory_sekd.teacher.model import Teacher


@dataclass
class Plan:
    """What has to be computed.

    Attributes:
        places: data set, example and segment of each missing segment, longest first: what does not fit into memory
            shows at once.
        lengths: their lengths in tokens, in the same order.
        missing, present: distinct segments that the cache lacks and has.
        response_tokens: of the missing segments.
    """

    places: list[tuple[int, int, int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    missing: int = 0
    present: int = 0
    response_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that the teacher has to read."""
        return sum(self.lengths)


def make_plan(
    datasets: Sequence[Any],
    known: Container[Key],
    progress: Callable[[int], None] = lambda _: None,
    informed: Sequence[Any] | None = None,
) -> Plan:
    """Go through the data sets and find out what is missing; the same on every rank.

    Args:
        datasets: of tokenized examples, with length and indices.
        known: the keys of the cache.
        progress: called with 1 after every example.
        informed: the same data sets with the teacher's own prompts, None where it reads the student's.
    """
    plan, seen = Plan(), set[Key]()
    for number, dataset in enumerate(datasets):
        for index, example in enumerate(dataset):
            asked = None if informed is None else informed[number][index]
            for part, (key, segment) in enumerate(questions(example, asked)):
                if key in seen:
                    continue

                seen.add(key)
                if key in known:
                    plan.present += 1
                    continue

                plan.places.append((number, index, part))
                plan.lengths.append(len(segment.ids))
                plan.response_tokens += segment.tokens
            progress(1)

    plan.missing = len(plan.places)
    order = sorted(range(plan.missing), key=lambda place: -plan.lengths[place])
    plan.places = [plan.places[place] for place in order]
    plan.lengths = [plan.lengths[place] for place in order]
    return plan


def collate(parts: Sequence[Segment], pad_id: int, device: torch.device) -> tuple[dict[str, Any], torch.Tensor]:
    """Pad segments on the right: the teacher's inputs and the response positions ``[batch, length]``."""
    length = max(len(part.ids) for part in parts)
    ids = torch.full((len(parts), length), pad_id, dtype=torch.int64)
    mask, rows = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    positions = torch.arange(length).repeat(len(parts), 1)
    for row, part in enumerate(parts):
        stop = len(part.ids)
        ids[row, :stop] = torch.from_numpy(part.ids)
        mask[row, :stop] = 1
        rows[row, :stop] = torch.from_numpy(part.rows)
        if part.positions is not None:
            positions[row, :stop] = torch.from_numpy(part.positions)

    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if any(part.positions is not None for part in parts):
        inputs["position_ids"] = positions.to(device)

    return inputs, rows.to(device)


def fill(
    plan: Plan,
    datasets: Sequence[Any],
    *,
    teacher: Teacher,
    kept: Format,
    writer: ShardWriter,
    batch_size: int,
    pad_id: int,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[int], None] = lambda _: None,
    informed: Sequence[Any] | None = None,
) -> None:
    """Let the teacher compute the plan's segments and write them.

    Args:
        plan: from :func:`make_plan`, the same on every rank.
        datasets: those that it was made from.
        teacher, kept, writer: of this rank.
        batch_size: segments per forward pass and rank.
        pad_id: any token id; padding is masked.
        device: of the teacher's inputs.
        rank, ranks: every rank takes every `ranks`-th batch; all make equally many forward passes.
        progress: called with the tokens that all ranks have read in this round.
        informed: the data sets with the teacher's own prompts, as for :func:`make_plan`.

    Raises:
        TeacherError: a shard cannot be written.
    """
    starts = list(range(0, plan.missing, batch_size))
    for round_start in range(0, len(starts), ranks):
        turn = starts[round_start : round_start + ranks]
        mine = turn[min(rank, len(turn) - 1)]
        asked = [fetch(place, datasets, informed) for place in plan.places[mine : mine + batch_size]]
        parts = [segment for _, segment in asked]
        inputs, rows = collate(parts, pad_id, device)
        records = {name: values.cpu() for name, values in kept.encode(teacher, inputs, rows).items()}
        if rank < len(turn):
            write(asked, records, writer)
        progress(sum(plan.lengths[turn[0] : turn[-1] + batch_size]))

    writer.flush()


def fetch(place: tuple[int, int, int], datasets: Sequence[Any], informed: Sequence[Any] | None) -> tuple[Key, Segment]:
    """Return what the teacher reads at a place of a plan, and the key that its answer is kept under."""
    number, index, part = place
    return questions(datasets[number][index], None if informed is None else informed[number][index])[part]


def write(asked: Sequence[tuple[Key, Segment]], records: dict[str, torch.Tensor], writer: ShardWriter) -> None:
    """Give each segment its part of the records ``[tokens, ...]``."""
    start = 0
    for key, segment in asked:
        stop = start + segment.tokens
        writer.add(key, {name: values[start:stop] for name, values in records.items()})
        start = stop
