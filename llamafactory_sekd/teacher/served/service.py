"""The HTTP service of a teacher: checked questions in, answers out; a bad request is one line and ends nothing.

One thread computes what waits, several questions at a time up to a token budget.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import ValidationError

from llamafactory_sekd.errors import ArgumentError, one_line
from llamafactory_sekd.teacher.cache.filling import collate
from llamafactory_sekd.teacher.cache.formats import Format
from llamafactory_sekd.teacher.cache.record_store import Record
from llamafactory_sekd.teacher.cache.segments import Segment
from llamafactory_sekd.teacher.model import Teacher
from llamafactory_sekd.teacher.served.protocol import CHECKSUM, FINGERPRINT, Question, ServerInfo, answer_of


logger = logging.getLogger(__name__)
WAITING = 256  # questions; beyond them the server says that it is busy
_POLL = 0.5
_RETRY_AFTER = "2"
_BYTES = "application/octet-stream"


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


class _RefusedError(Exception):
    def __init__(self, status: int, line: str, **headers: str) -> None:
        super().__init__(line)
        self.status = status
        self.headers = headers


def make_app(
    worker: Worker,
    info: ServerInfo,
    *,
    head: bytes | None,
    tokenizer: dict[str, Any],
    token: str | None,
    max_bytes: int,
) -> FastAPI:
    """Return the application.

    Args:
        worker: that computes.
        info: what it says of its teacher.
        head: the head's safetensors bytes, None where hidden states are not sent.
        tokenizer: from ``tokens.describe``.
        token: that every request but for `/health` must bring; None for a server that only this machine reaches.
        max_bytes: of a request.
    """
    app = FastAPI(title="sekd serve", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guarded(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and request.url.path != "/health" and not hmac.compare_digest(given.encode(), token.encode()):
            return _refusal(401, "a bearer token is needed, and this one is not the server's")
        return await call_next(request)

    @app.exception_handler(_RefusedError)
    async def refused(request: Request, error: _RefusedError) -> Response:
        return _refusal(error.status, str(error), **error.headers)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request: Request, error: Any) -> Response:
        return _refusal(error.status_code, f"{request.method} {request.url.path} is not of this server")

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok", "model": info.model}

    @app.get("/v1/info")
    async def describe() -> Any:
        return info.to_json()

    @app.get("/v1/tokenizer")
    async def describe_tokenizer() -> Any:
        return JSONResponse(tokenizer)

    @app.get("/v1/head")
    async def hand_out_head() -> Response:
        if head is None:
            raise _RefusedError(409, "this teacher's logits are more than its head's product: ask for topk")
        return Response(head, media_type=_BYTES)

    @app.get("/v1/progress")
    async def progress() -> Any:
        counters = worker.counters
        return {
            "uptime": time.time() - counters.started,
            "waiting": worker.waiting,
            "tokens_per_second": counters.tokens / counters.seconds if counters.seconds else None,
            **{name: value for name, value in vars(counters).items() if name != "started"},
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(prometheus(worker), media_type="text/plain; version=0.0.4")

    @app.post("/v1/answers")
    async def answers(request: Request) -> Response:
        if request.headers.get("Content-Type", "").split(";")[0] != "application/json":
            raise _RefusedError(415, "a question is JSON (Content-Type: application/json)")
        question = _parsed(await _body(request, max_bytes))
        if question.teacher != info.fingerprint:
            raise _RefusedError(
                409,
                f"this server has the teacher {info.model} ({info.fingerprint[:12]}), and the question is for "
                f"{question.teacher[:12]!r}",
            )
        try:
            parts, kept = question.segments(info), question.kept(info)
            future = worker.submit(parts, kept, together=question.together)
        except ArgumentError as error:
            raise _RefusedError(422, one_line(str(error))) from error
        except BusyError:
            raise _RefusedError(429, "too many questions wait", **{"Retry-After": _RETRY_AFTER}) from None

        waited = asyncio.wrap_future(future)
        while not (await asyncio.wait({waited}, timeout=_POLL))[0]:
            if await request.is_disconnected():
                future.cancel()  # nobody would read it
                raise _RefusedError(499, "the connection was closed")
        try:
            data, checksum = await asyncio.to_thread(answer_of, waited.result())
        except RuntimeError as error:
            raise _RefusedError(500, f"the forward pass failed: {error}") from error
        return Response(data, media_type=_BYTES, headers={CHECKSUM: checksum, FINGERPRINT: info.fingerprint})

    return app


async def _body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _RefusedError(413, f"a question may have {max_bytes:,} bytes: ask about fewer sequences at a time")
    return bytes(body)


def _parsed(body: bytes) -> Question:
    try:
        return Question.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the question"
        raise _RefusedError(400, f"{place}: {one_line(first['msg'])}") from error


def _refusal(status: int, line: str, **headers: str) -> Response:
    return JSONResponse({"error": line}, status_code=status, headers=headers)


def prometheus(worker: Worker) -> str:
    """Return the counters in the text format of Prometheus."""
    counters = worker.counters
    rows = [
        ("questions_total", "counter", "Questions answered.", counters.questions),
        ("sequences_total", "counter", "Sequences read.", counters.sequences),
        ("tokens_total", "counter", "Tokens read.", counters.tokens),
        ("response_tokens_total", "counter", "Response tokens answered.", counters.response_tokens),
        ("forward_passes_total", "counter", "Forward passes.", counters.passes),
        ("failures_total", "counter", "Forward passes that failed.", counters.failures),
        ("computing_seconds_total", "counter", "Seconds spent in forward passes.", counters.seconds),
        ("waiting_questions", "gauge", "Questions that wait.", worker.waiting),
        ("start_time_seconds", "gauge", "When the server was started.", counters.started),
    ]
    lines = [
        f"# HELP sekd_{name} {text}\n# TYPE sekd_{name} {kind}\nsekd_{name} {value}\n"
        for name, kind, text, value in rows
    ]
    return "".join(lines)
