"""`sekd serve` as a process of its own, on a free port of the loopback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from helpers.runs import CLI


SEKD = str(Path(CLI).with_name("sekd"))


class Server:
    """A running server: its address, and its process."""

    def __init__(self, arguments: list[str], env: dict[str, str] | None = None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
        self.process = subprocess.Popen(
            [SEKD, "serve", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self.url = self._address()
        self.port = int(self.url.rsplit(":", 1)[1])
        threading.Thread(target=self._read_on, daemon=True).start()

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=1200, trust_env=False, **more)

    def ask(self, question: Any, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/answers", json=question, timeout=1200, trust_env=False, **more)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def _address(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            found = re.search(r"^Serving .* at (http://\S+)", line)
            if found:
                return found.group(1)
        raise AssertionError("".join(self.lines))

    def _read_on(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)


@contextmanager
def serving(model: Path, *arguments: str, port: int = 0, env: dict[str, str] | None = None) -> Iterator[Server]:
    """Serve a model for the length of the block."""
    server = Server(["--model", str(model), "--port", str(port), *arguments], env)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
