"""Requests to a teacher's server: repeated with growing pauses while it is gone, slow or busy."""

from __future__ import annotations

import ipaddress
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import torch

from llamafactory_sekd.errors import TeacherError, one_line
from llamafactory_sekd.fingerprints import xxh3
from llamafactory_sekd.teacher.cache.formats import Format
from llamafactory_sekd.teacher.cache.record_store import Record
from llamafactory_sekd.teacher.cache.segments import Segment
from llamafactory_sekd.teacher.served.protocol import (
    CHECKSUM,
    FINGERPRINT,
    GarbageError,
    ServerInfo,
    question_of,
    read_answer,
)


T = TypeVar("T")
logger = logging.getLogger(__name__)

TOKEN = "SEKD_SERVER_TOKEN"  # the environment variable: a token has no place in a YAML file
_CONNECT = 10.0
# A first answer may take this long before it is asked again; each time that is doubled.
_FIRST_ANSWER = 60.0
_LONGEST_PAUSE = 30.0
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_GARBAGE = 3
_SHOWN = 200


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class NoAnswerError(TeacherError):
    """The patience is at its end; `problem` says in a few words what kept the last try from an answer."""

    def __init__(self, message: str, problem: str) -> None:
        super().__init__(message)
        self.problem = problem


class HttpConnection:
    """Requests with patience; safe to use from several threads.

    Args:
        url: of the server.
        patience: how many seconds one request may take, its repetitions included.
        say: called with a line for each repetition.

    Raises:
        TeacherError: the URL is none.
    """

    def __init__(self, url: str, patience: float, say: Callable[[str], None] = logger.warning) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise TeacherError(
                f"`teacher_server: {url}` is no address: use http://HOST:PORT, and {TOKEN} for its token."
            )
        self.url = url.rstrip("/")
        self.patience = patience
        self.say = say
        token = os.environ.get(TOKEN)
        self._closed = threading.Event()
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=64),
            trust_env=not is_loopback(parts.hostname),  # a proxy does not know this machine's own addresses
        )

    def close(self) -> None:
        """End requests that wait for their next try."""
        self._closed.set()
        self._client.close()

    def request(
        self,
        method: str,
        path: str,
        read: Callable[[httpx.Response], T],
        *,
        content: bytes | None = None,
        absent: T | None = None,
    ) -> T:
        """Return what ``read`` makes of the answer.

        Args:
            method, path, content: of the request; the content is JSON.
            read: raises :class:`GarbageError` where the answer is not what was asked for.
            absent: returned where the server does not know the path; None raises.

        Raises:
            TeacherError: the server refuses the request.
            NoAnswerError: the patience is at its end.
        """
        started, pause, garbage, limit = time.monotonic(), 1.0, 0, _FIRST_ANSWER
        while True:
            problem, wanted_pause = "", 0.0
            remaining = self.patience - (time.monotonic() - started)
            try:
                response = self._client.request(
                    method,
                    self.url + path,
                    content=content,
                    headers={"Content-Type": "application/json"} if content is not None else {},
                    timeout=httpx.Timeout(max(1.0, min(limit, remaining)), connect=max(1.0, min(_CONNECT, remaining))),
                )
                if response.status_code == 404 and absent is not None:
                    return absent
                if response.status_code in _RETRIED:
                    problem = f"answers {response.status_code} ({self._line(response)})"
                    wanted_pause = _seconds(response.headers.get("Retry-After"))
                elif response.status_code >= 400:
                    raise TeacherError(self._refused(response))
                else:
                    return read(response)
            except GarbageError as error:
                garbage += 1
                problem = f"answers with garbage ({error})"
                if garbage == _GARBAGE:
                    raise TeacherError(
                        f"`teacher_server: {self.url}` {problem}, {_GARBAGE} times in a row: look at what is between "
                        "this machine and the server, and start the server again."
                    ) from error
            except httpx.TimeoutException:
                problem, limit = f"has not answered for {min(limit, max(1.0, remaining)):.0f} s", 2 * limit
            except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: closed meanwhile
                if self._closed.is_set():
                    raise TeacherError(f"`teacher_server: {self.url}` is no longer needed.") from error
                problem = f"cannot be reached ({one_line(str(error)) or type(error).__name__})"

            pause = min(max(pause, wanted_pause), _LONGEST_PAUSE)
            waited = time.monotonic() - started
            if waited + pause > self.patience:
                raise NoAnswerError(
                    f"`teacher_server: {self.url}` {problem}, and that for {waited:.0f} s "
                    f"(`teacher_server_patience: {self.patience:g}`): start it again with the same model, and then "
                    "this command, which resumes where it stopped.",
                    problem,
                )
            self.say(f"The teacher's server {self.url} {problem}; the next try is in {pause:.0f} s.")
            if self._closed.wait(pause):
                raise TeacherError(f"`teacher_server: {self.url}` is no longer needed.")
            pause *= 2

    def _refused(self, response: httpx.Response) -> str:
        line = self._line(response)
        if response.status_code in (401, 403):
            return (
                f"`teacher_server: {self.url}` refuses this run's token ({line}): set the environment variable "
                f"{TOKEN} to the server's."
            )
        return f"`teacher_server: {self.url}` refuses the request ({response.status_code}: {line})."

    def _line(self, response: httpx.Response) -> str:
        try:
            content = response.json()
            text = content.get("error", content) if isinstance(content, dict) else content
            if isinstance(text, dict):
                text = text.get("message", text)
        except ValueError:
            text = response.text
        return one_line(str(text))[:_SHOWN] or "without a word"


def speaks_our_protocol(url: str, patience: float) -> bool:
    """Whether an address is a `sekd serve`; vLLM knows its paths not."""
    asked = HttpConnection(url, patience)
    try:
        return asked.request("GET", "/v1/info", lambda _: True, absent=False)
    finally:
        asked.close()


class Connection(HttpConnection):
    """A teacher behind `sekd serve`.

    Attributes:
        info: what the server says of its teacher.
    """

    def __init__(self, url: str, patience: float, say: Callable[[str], None] = logger.warning) -> None:
        super().__init__(url, patience, say)
        self.info: ServerInfo = self.request("GET", "/v1/info", self._read_info)

    def ask(self, parts: Sequence[Segment], kept: Format, *, together: bool) -> Record:
        """Return the records of some segments, one after the other; see ``protocol.Question``.

        Raises:
            TeacherError: the server refuses, has another teacher by now, or the patience is at its end.
        """
        tokens = sum(part.tokens for part in parts)
        fingerprint = self.info.fingerprint

        def read(response: httpx.Response) -> Record:
            if response.headers.get(FINGERPRINT) != fingerprint:
                raise GarbageError("it does not say that it is this teacher's")
            return read_answer(response.content, response.headers.get(CHECKSUM), kept, tokens)

        content = question_of(parts, kept, fingerprint, together=together)
        return self.request("POST", "/v1/answers", read, content=content)

    def head(self) -> dict[str, torch.Tensor]:
        """Return the head's ``weight`` and, where it has one, ``bias``."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        def read(response: httpx.Response) -> dict[str, torch.Tensor]:
            wanted = self.info.head or {}
            if len(response.content) != wanted.get("bytes") or xxh3(response.content) != wanted.get("xxh3"):
                raise GarbageError(f"the head's {len(response.content):,} bytes do not match their checksum")
            try:
                return load(response.content)
            except (SafetensorError, ValueError) as error:
                raise GarbageError("the head's bytes are no safetensors") from error

        return self.request("GET", "/v1/head", read)

    def tokenizer(self) -> dict[str, Any]:
        """Return what ``tokens.describe`` made of the teacher's tokenizer."""
        return self.request("GET", "/v1/tokenizer", _json)

    def _read_info(self, response: httpx.Response) -> ServerInfo:
        try:
            return ServerInfo.of_json(response.json())
        except ValueError as error:
            raise TeacherError(
                f"`teacher_server: {self.url}` is no `sekd serve` of this version ({one_line(str(error))[:_SHOWN]})."
            ) from error


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise GarbageError("its bytes are no JSON") from error


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
