"""One model, many questions: a thread that computes what waits, several questions at a time up to a token budget."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from llamafactory_sekd.errors import one_line
from llamafactory_sekd.teacher.cache import Format, collate
from llamafactory_sekd.teacher.cache.record_store import Record
from llamafactory_sekd.teacher.cache.segments import Segment
from llamafactory_sekd.teacher.model import Teacher


logger = logging.getLogger(__name__)
WAITING = 256  # questions; beyond them the server says that it is busy


class BusyError(Exception):
    """Too many questions wait."""


@dataclass
class Job:
    """A question that waits for its answer.

    Attributes:
        parts, kept: what is asked.
        together: whether other questions may share its forward pass.
        future: of the records.
    """

    parts: list[Segment]
    kept: Format
    together: bool
    future: Future[Record] = field(default_factory=Future)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Return what jobs of one forward pass have in common."""
        return (self.kept.name, sorted(self.kept.fields().items()), getattr(self.kept, "vocab_size", None))

    @property
    def size(self) -> tuple[int, int]:
        """Return the number of sequences and the length of the longest."""
        return len(self.parts), max(len(part.ids) for part in self.parts)


@dataclass
class Counters:
    """What the service has done since it was started."""

    started: float = field(default_factory=time.time)
    questions: int = 0
    sequences: int = 0
    tokens: int = 0
    response_tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    failures: int = 0


class Worker:
    """Computes answers, one forward pass at a time.

    Args:
        teacher: placed, on this machine.
        device: of its inputs.
        budget: padded tokens of a forward pass; a question that has more is computed in several.
    """

    def __init__(self, teacher: Teacher, device: torch.device, budget: int) -> None:
        self.teacher = teacher
        self.device = device
        self.budget = budget
        self.counters = Counters()
        self._jobs: queue.Queue[Job] = queue.Queue(WAITING)
        self._held: Job | None = None  # taken from the queue, but too large for the pass that was put together
        threading.Thread(target=self._run, name="teacher", daemon=True).start()

    @property
    def waiting(self) -> int:
        """How many questions wait."""
        return self._jobs.qsize() + (self._held is not None)

    def submit(self, parts: list[Segment], kept: Format, *, together: bool) -> Future[Record]:
        """Put a question behind the others; :class:`BusyError` where too many wait."""
        job = Job(parts, kept, together)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise BusyError from None

        return job.future

    def _run(self) -> None:
        while True:
            jobs = [job for job in self._next() if job.future.set_running_or_notify_cancel()]
            if not jobs:
                continue

            try:
                self._answer(jobs)
            except Exception as error:  # of the model or the device: the question fails, and the server goes on
                logger.exception("A forward pass failed.")
                self.counters.failures += 1
                for job in jobs:
                    if not job.future.done():
                        job.future.set_exception(RuntimeError(one_line(str(error)) or type(error).__name__))
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _next(self) -> list[Job]:
        """Return the jobs of the next pass: the first that waits, and those that fit next to it."""
        first = self._held or self._jobs.get()
        self._held = None
        jobs = [first]
        count, longest = first.size
        while first.together:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break

            more, length = job.size
            width = max(longest, length)
            if not job.together or job.kind != first.kind or (count + more) * width > self.budget:
                self._held = job
                break

            jobs.append(job)
            count, longest = count + more, width

        return jobs

    def _answer(self, jobs: Sequence[Job]) -> None:
        started, counters = time.perf_counter(), self.counters
        parts = [part for job in jobs for part in job.parts]
        pieces: list[Record] = []
        for some in self._slices(parts):
            inputs, rows = collate(some, 0, self.device)
            records = jobs[0].kept.encode(self.teacher, inputs, rows)
            pieces.append({name: values.cpu() for name, values in records.items()})
            counters.passes += 1

        records = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        counters.seconds += time.perf_counter() - started
        counters.questions += len(jobs)
        counters.sequences += len(parts)
        counters.tokens += sum(len(part.ids) for part in parts)
        start = 0
        for job in jobs:
            stop = start + sum(part.tokens for part in job.parts)
            job.future.set_result({name: values[start:stop] for name, values in records.items()})
            start = stop
        counters.response_tokens += start

    def _slices(self, parts: list[Segment]) -> Iterator[list[Segment]]:
        """Cut a pass that is over the budget into several, in order."""
        some: list[Segment] = []
        for part in parts:
            longest = max(len(other.ids) for other in [*some, part])
            if some and (len(some) + 1) * longest > self.budget:
                yield some
                some = []
            some.append(part)
        yield some
