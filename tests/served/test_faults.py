"""What goes wrong between a run and its server is repeated with a line, and in the end one clear error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from helpers.servers import serving

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.teacher.cache.formats import HiddenFormat
from llamafactory_sekd.teacher.cache.segments import Segment
from llamafactory_sekd.teacher.served.connection import Connection


PART = Segment(np.array([0, 5, 9, 44, 7], dtype=np.int32), np.array([0, 0, 1, 1, 0], dtype=bool), None)


@pytest.fixture(scope="module")
def server(tiny_root):
    with serving(tiny_root / "teacher") as running:
        yield running


@contextmanager
def between(url: str, faults: list[Any]) -> Iterator[str]:
    """A proxy that spoils as many answers as there are faults: a status, or a function of the bytes."""

    class Proxy(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

        def do_GET(self) -> None:
            self.pass_on(httpx.get(url + self.path, trust_env=False, timeout=1200))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            fault = faults.pop(0) if faults else None
            if isinstance(fault, int):
                self.reply(fault, b'{"error": "busy"}', {"Retry-After": "2"})
                return
            json = {"Content-Type": "application/json"}
            answer = httpx.post(url + self.path, content=body, headers=json, trust_env=False, timeout=1200)
            self.pass_on(answer, fault)

        def pass_on(self, answer: httpx.Response, fault: Any = None) -> None:
            kept = {name: value for name, value in answer.headers.items() if name.startswith("x-sekd")}
            self.reply(answer.status_code, fault(answer.content) if fault else answer.content, kept)

        def reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ([429], "answers 429 (busy); the next try is in 2 s"),  # as the server wants, and not after 1 s
        ([flipped], "do not match their checksum"),
        ([lambda data: data[:10]], "do not match their checksum"),
    ],
    ids=["busy", "a bit", "cut"],
)
def test_a_passing_fault_is_told_and_the_answer_is_the_right_one(server, faults, words):
    straight = Connection(server.url, 60)
    kept = HiddenFormat(straight.info.width, torch.float32)
    expected = straight.ask([PART], kept, together=False)["hidden"]
    lines: list[str] = []
    with between(server.url, faults) as url:
        found = Connection(url, 60, lines.append).ask([PART], kept, together=False)["hidden"]
    assert torch.equal(found, expected)
    assert words in " ".join(lines)
    assert not faults


def test_a_slow_server_is_told_of_and_waited_for(server, monkeypatch):
    straight = Connection(server.url, 60)
    kept = HiddenFormat(straight.info.width, torch.float32)
    monkeypatch.setattr("llamafactory_sekd.teacher.served.connection._FIRST_ANSWER", 1.0)
    told = threading.Event()
    lines: list[str] = []

    def slow(data: bytes) -> bytes:
        assert told.wait(1200)  # longer than the first try takes, whatever this machine does
        return data

    def say(line: str) -> None:
        lines.append(line)
        told.set()

    with between(server.url, [slow]) as url:
        connection = Connection(url, 1200, say)
        found = connection.ask([PART], kept, together=False)["hidden"]
    assert torch.equal(found, straight.ask([PART], kept, together=False)["hidden"])
    assert lines[0] == f"The teacher's server {url} has not answered for 1 s; the next try is in 1 s."


def test_a_fault_that_stays_is_one_line(server):
    with between(server.url, [flipped] * 9) as url:
        connection = Connection(url, 60, lambda _: None)
        with pytest.raises(TeacherError, match=r"garbage.*3 times in a row") as garbage:
            connection.ask([PART], HiddenFormat(connection.info.width, torch.float32), together=False)
    with between(server.url, [503] * 99) as url:
        connection = Connection(url, 4, lambda _: None)
        with pytest.raises(TeacherError, match=r"answers 503 \(busy\), and that for \d s") as busy:
            connection.ask([PART], HiddenFormat(connection.info.width, torch.float32), together=False)
    assert not any("\n" in str(error.value) for error in (garbage, busy))
