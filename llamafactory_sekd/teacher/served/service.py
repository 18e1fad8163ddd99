"""The HTTP service of a teacher: checked questions in, answers out; a bad request is one line and ends nothing."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import ValidationError

from llamafactory_sekd.errors import ArgumentError, one_line
from llamafactory_sekd.teacher.served.protocol import CHECKSUM, FINGERPRINT, Question, ServerInfo, answer_of
from llamafactory_sekd.teacher.served.worker import BusyError, Worker


_POLL = 0.5
_RETRY_AFTER = "2"
_BYTES = "application/octet-stream"


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
