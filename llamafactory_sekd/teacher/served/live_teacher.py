"""A teacher on another machine that answers while the student trains, or fills a cache."""

from __future__ import annotations

import itertools
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.objectives import LogitTransform, response_positions
from llamafactory_sekd.teacher.cache.filling import Plan, fetch, write
from llamafactory_sekd.teacher.cache.formats import Format, read_transform
from llamafactory_sekd.teacher.cache.record_store import Record, ShardWriter
from llamafactory_sekd.teacher.cache.segments import Key, Segment, segments_of_each
from llamafactory_sekd.teacher.served.protocol import ServerInfo
from llamafactory_sekd.teacher.source import Answers, Collate, TeacherSource, WrappedCollator, every_logit


TICKET = "teacher_ticket"
_IN_FLIGHT = 8


class Answering(Protocol):
    """A server that can be asked, whatever it speaks.

    Attributes:
        url, info: its address, and what it says of its teacher.
    """

    url: str
    info: ServerInfo

    def ask(self, parts: Sequence[Segment], kept: Format, *, together: bool) -> Record:
        """Return the records of some segments, one after the other."""

    def head(self) -> dict[str, torch.Tensor]:
        """Return the head's ``weight`` and, where it has one, ``bias``."""

    def close(self) -> None:
        """End what waits."""


class ServedTeacher(TeacherSource):
    """Asks a server about each batch, where it can before the batch is due.

    A batch that is known ahead gets a ticket, ``teacher_ticket`` ``[batch, 2]`` int64: the number of its request and
    each row's place in it. Without a ticket the answer is asked for when it is needed.

    Args:
        server: the teacher.
        kept: what is asked for.
        device: where the batches are.
    """

    collated_keys = (TICKET,)

    def __init__(self, server: Answering, kept: Format, device: torch.device) -> None:
        self.server = server
        self.kept = kept
        self.device = device
        self._pool = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="teacher")
        # Numbers that no other rank uses: a batch may have been collated by another process.
        self._numbers = itertools.count(secrets.randbits(62))
        self._requests: dict[int, tuple[list[int], Future[Record]]] = {}
        self._head: dict[str, torch.Tensor] | None = None

    def close(self) -> None:
        """Give up what is still under way."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.server.close()

    def start(self, sequences: Sequence[Sequence[Segment]]) -> torch.Tensor:
        """Ask about the segments of each sequence of a batch, and return its ticket."""
        number = next(self._numbers)
        parts = [part for sequence in sequences for part in sequence]
        if parts:
            tokens = [sum(part.tokens for part in sequence) for sequence in sequences]
            self._requests[number] = (tokens, self._pool.submit(self.server.ask, parts, self.kept, together=True))

        return torch.tensor([[number, row] for row in range(len(sequences))], dtype=torch.int64)

    def announce(self, batches: Sequence[dict[str, Any]]) -> None:
        """Ask about micro-batches that are complete by now, so that the answers come while the student computes."""
        for batch in batches:
            if TICKET not in batch:
                rows, _ = response_positions(batch["labels"])
                batch[TICKET] = self.start(self._sequences(batch, rows)).to(rows.device)

    def can_answer_in_chunks(self, inputs: dict[str, Any]) -> bool:
        """Return true: hidden states are asked for only where the head says the rest."""
        return True

    def logits(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Logits ``[tokens, vocab]``: exact for ``hidden``, with an even tail for ``topk``."""
        return every_logit(self.kept.decode(self._records(inputs, rows), self._own_head, None), self.device)

    def answers(self, inputs: dict[str, Any], rows: torch.Tensor) -> Answers:
        """Wait for the batch's answers; see :class:`TeacherSource`."""
        records = self._records(inputs, rows)
        return lambda vocab_size: nullcontext(self.kept.decode(records, self._own_head, vocab_size))

    def logit_transform(self, inputs: dict[str, Any]) -> LogitTransform | None:
        """Return what makes its logits of its head times its hidden states; None where nothing does."""
        info = self.server.info
        return read_transform(info.transform) if info.hidden else None

    @contextmanager
    def head_parameters(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight ``[vocab, width]`` and bias ``[vocab]`` (or None) of the head."""
        info = self.server.info
        if not info.hidden:  # its size alone: a top-k cache keeps no head
            yield torch.empty(info.rows, info.width, device="meta"), None
            return
        head = self._own_head()
        yield head["weight"], head.get("bias")

    def _own_head(self) -> dict[str, torch.Tensor]:
        if self._head is None:
            self._head = {name: tensor.to(self.device) for name, tensor in self.server.head().items()}

        return self._head

    def _records(self, inputs: dict[str, Any], rows: torch.Tensor) -> Record:
        ticket = inputs.get(TICKET)
        numbers = [] if ticket is None else ticket[:, 0].unique().tolist()
        if ticket is None or len(numbers) != 1 or numbers[0] not in self._requests:
            return self._asked_now(inputs, rows)
        tokens, future = self._requests.pop(numbers[0])
        parts = {name: values.split(tokens) for name, values in future.result().items()}
        # Rows that only fill up the epoch's last batch have lost their labels since.
        wanted = [
            place for place, has_labels in zip(ticket[:, 1].tolist(), rows.any(-1).tolist(), strict=True) if has_labels
        ]
        return {
            name: torch.cat([values[place] for place in wanted]).to(self.device)
            if wanted
            else values[0][:0].to(self.device)
            for name, values in parts.items()
        }

    def _asked_now(self, inputs: dict[str, Any], rows: torch.Tensor) -> Record:
        parts = [part for sequence in self._sequences(inputs, rows) for part in sequence]
        if not parts:
            return {
                name: torch.zeros(0, *shape, dtype=dtype, device=self.device)
                for name, (dtype, shape) in self.kept.fields().items()
            }
        records = self.server.ask(parts, self.kept, together=True)
        return {name: values.to(self.device) for name, values in records.items()}

    def _sequences(self, inputs: dict[str, Any], rows: torch.Tensor) -> list[list[Segment]]:
        """Return the segments of a batch that is padded on the right and not packed."""
        mask = inputs.get("attention_mask")
        if mask is None or mask.dim() != 2 or int(mask.max()) > 1:
            raise TeacherError(
                f"`teacher_server: {self.server.url}` has been asked about a batch that was packed by another "
                "process: set `packing: false`, or `dispatch_batches: false`."
            )
        found = []
        for ids, length, marked in zip(inputs["input_ids"], mask.sum(-1).tolist(), rows, strict=True):
            cut = slice(0, length)
            is_response = marked[cut].cpu().numpy()
            part = Segment(ids[cut].cpu().numpy().astype(np.int32), is_response, None)
            found.append([part] if is_response.any() else [])

        return found


class TicketCollator(WrappedCollator):
    """Wraps a collator: it asks the server about the batch as soon as the batch is put together.

    Args:
        collate: the host's collator; it may change the features, so segments are taken before it runs.
        teacher: the teacher.
    """

    def __init__(self, collate: Collate, teacher: ServedTeacher) -> None:
        super().__init__(collate)
        self.teacher = teacher

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Ask, and collate as the host does."""
        ticket = self.teacher.start(segments_of_each(features))
        batch = self.collate(features)
        batch[TICKET] = ticket
        return batch


def fill_from_server(
    plan: Plan,
    datasets: Sequence[Any],
    *,
    server: Answering,
    kept: Format,
    writer: ShardWriter,
    batch_size: int,
    in_flight: int,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[int], None] = lambda _: None,
    informed: Sequence[Any] | None = None,
) -> None:
    """Let a server compute the plan's segments and write them, as `cache.filling.fill` lets a local teacher do it.

    A request is a batch of the local build, so a server on the same kind of machine gives its answers to the bit.
    Where a request fails in the end, what has arrived before it is written first.

    Args:
        plan, datasets, kept, writer, batch_size, rank, ranks, progress, informed: as for a local teacher.
        server: the teacher.
        in_flight: requests at a time.

    Raises:
        TeacherError: the server refuses or stays away, or a shard cannot be written.
    """
    starts = list(range(0, plan.missing, batch_size))[rank::ranks]
    waiting: deque[tuple[int, list[tuple[Key, Segment]], Future[Record]]] = deque()
    with ThreadPoolExecutor(in_flight, thread_name_prefix="teacher") as pool:

        def take() -> None:
            start, asked, future = waiting.popleft()
            write(asked, future.result(), writer)
            progress(sum(plan.lengths[start : start + batch_size]))

        try:
            for start in starts:
                asked = [fetch(place, datasets, informed) for place in plan.places[start : start + batch_size]]
                parts = [segment for _, segment in asked]
                waiting.append((start, asked, pool.submit(server.ask, parts, kept, together=False)))
                if len(waiting) > in_flight:
                    take()
            while waiting:
                take()
        except BaseException:
            for _, _, future in waiting:
                future.cancel()
            server.close()
            raise
        finally:
            writer.flush()
