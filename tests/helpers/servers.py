"""`sekd serve` as a process of its own, on a free port of the loopback."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from helpers.forks import Fork, text
from helpers.runs import CLI


SEKD = str(Path(CLI).with_name("sekd"))


class Server:
    """A running server: its address, and its process."""

    def __init__(self, arguments: list[str], env: dict[str, str] | None = None) -> None:
        self.process = Fork([SEKD, "serve", *arguments], env={"CUDA_VISIBLE_DEVICES": "", **(env or {})}, merged=True)
        self.url = self._address()
        self.port = int(self.url.rsplit(":", 1)[1])

    @property
    def lines(self) -> list[str]:
        """What it has printed so far."""
        return text(self.process.out).splitlines()

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=1200, trust_env=False, **more)

    def ask(self, question: Any, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/answers", json=question, timeout=1200, trust_env=False, **more)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _address(self) -> str:
        while True:
            ended = self.process.poll() is not None
            printed = text(self.process.out)
            if found := re.search(r"^Serving .* at (http://\S+) .*\n", printed, re.MULTILINE):
                return found.group(1)
            assert not ended, printed
            time.sleep(0.02)


@contextmanager
def serving(model: Path, *arguments: str, port: int = 0, env: dict[str, str] | None = None) -> Iterator[Server]:
    """Serve a model for the length of the block."""
    server = Server(["--model", str(model), "--port", str(port), *arguments], env)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
