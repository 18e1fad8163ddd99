"""A run that adds to a cache: its lock and its writers, what is missing, and one pass of the teacher over that."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.files import locked
from llamafactory_sekd.objectives import LogitTransform
from llamafactory_sekd.ranks import position, wait_for_all
from llamafactory_sekd.teacher.cache.cache_manifest import (
    HEAD,
    MANIFEST,
    Fingerprints,
    Manifest,
    Settings,
    head_damage,
    open_for_writing,
)
from llamafactory_sekd.teacher.cache.formats import Format, written_transform
from llamafactory_sekd.teacher.cache.record_store import ShardReader, ShardWriter, write_tensors
from llamafactory_sekd.teacher.cache.segments import Key, Segment, questions
from llamafactory_sekd.teacher.model import Teacher


class Admitted(Protocol):
    """What a cache asks of a teacher before its first record, wherever the teacher computes."""

    def logit_transform(self, inputs: dict[str, Any]) -> LogitTransform | None:
        """Return what makes its logits of its head times its hidden states; None where nothing does."""

    def head_parameters(self) -> AbstractContextManager[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight ``[vocab, width]`` and bias ``[vocab]`` (or None) of the head, for the duration."""


class Session:
    """Opens a cache for writing, or says that there is none yet; all ranks construct it together.

    Args:
        directory: of the cache, shared by all ranks.
        run: this run's fingerprints.
        settings: what a new cache keeps and an old one must keep; None for whatever an old one keeps.

    Attributes:
        manifest: None until there is one.
        reader: of what is there.

    Raises:
        TeacherError: another run writes to it, or it was built with something else.
    """

    def __init__(self, directory: Path, run: Fingerprints, settings: Settings | None = None) -> None:
        self.directory = directory
        self.run = run
        self.settings = settings or Settings()
        self.rank, self.ranks = position()
        self._stack = ExitStack()
        try:
            if self.rank == 0:
                self._stack.enter_context(locked(self.directory / ".sekd.lock", error=TeacherError))
                open_for_writing(directory, run, settings)

            wait_for_all()
            self.manifest = Manifest.load(directory) if (directory / MANIFEST).is_file() else None
            self.head_is_intact = self.manifest is not None and head_damage(directory, self.manifest) is None
            self.reader = ShardReader(directory)
            wait_for_all()  # so that all ranks have seen the same before any of them writes
        except BaseException:
            self.close()
            raise

    def admit(
        self, teacher: Admitted, vocab_size: int, probe: dict[str, Any], autocast: torch.dtype | None = None
    ) -> Manifest:
        """Take a teacher in, placed: write its head and the manifest where they are not there yet.

        Args:
            teacher: the teacher that will compute the records.
            vocab_size: ids that the tokenizer uses.
            probe: any batch, to find out whether the head says it all.
            autocast: the type of the products where it is not the head's: hidden states in it lose nothing, but for
                a CPU that does such products in float32.

        Raises:
            TeacherError: hidden states are to be kept of a teacher whose logits are more than its head's product.
        """
        kind = self.manifest.format if self.manifest is not None else self.settings.format
        transform = teacher.logit_transform(probe)
        if kind == "hidden" and transform is None:
            raise TeacherError(
                "the teacher's logits are more than a product of its LM head, scaled or capped (adapter, "
                "quantization), so hidden states do not keep them: build the cache with `sekd cache … --format topk`."
            )
        if not self.head_is_intact:
            with teacher.head_parameters() as (weight, bias):
                if self.rank == 0:
                    self._create(weight, bias, vocab_size, kind, transform, autocast or weight.dtype)

            wait_for_all()
            self.head_is_intact = True

        self.manifest = Manifest.load(self.directory)
        return self.manifest

    def writer(self, **limits: Any) -> ShardWriter:
        """Return the writer of this rank; see :class:`ShardWriter` for the limits."""
        return ShardWriter(self.directory, self.rank, **limits)

    def close(self) -> None:
        """Let other runs write."""
        self._stack.close()

    def _create(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        vocab_size: int,
        kind: str,
        transform: LogitTransform | None,
        product_type: torch.dtype,
    ) -> None:
        entry = None
        if kind == "hidden":
            tensors = {"weight": weight.detach().cpu()}
            if bias is not None:
                tensors["bias"] = bias.detach().cpu()
            entry = write_tensors(self.directory / HEAD, tensors)

        if self.manifest is None:
            manifest = self.settings.manifest(
                vocab_size=vocab_size,
                rows=weight.shape[0],
                width=weight.shape[1],
                computed_in=product_type,
                head=entry,
                transform=None if entry is None or transform is None else written_transform(transform),
                data=self.run.data,
                teacher=self.run.teacher() if self.run.teacher is not None else {},
                software=self.run.software,
            )
            manifest.save(self.directory)
        elif entry != self.manifest.head:
            raise TeacherError(
                f"{self.directory / HEAD} was damaged, and this teacher's head does not match: build a new cache."
            )


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
