"""The real `llamafactory-cli webui` in a process of its own, and a page of it in a real browser."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
OFFLINE = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "BROWSER": "true",  # the host opens a browser of its own
}

# The name that the host proposes for a saved configuration.
DATED = r"/^[0-9-]{10,}\.yaml$/"
# A list of options closes when an answer of the server renders its field again; then it is opened once more.
ATTEMPTS = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(directory: Path, **environment: str) -> Iterator[str]:
    """Run the web UI in `directory` and yield its address."""
    port = free_port()
    env = {**os.environ, **OFFLINE, "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), **environment}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    address = f"http://127.0.0.1:{port}"
    with open(directory / "webui.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "llamafactory-cli", "webui"],
            cwd=directory,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_for(address, process, directory / "webui.log")
            yield address
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(timeout=30)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 1200
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urlopen(address, timeout=2).close()
            return
        except (URLError, OSError):
            time.sleep(0.3)

    raise RuntimeError("the web UI did not come up:\n" + log.read_text(encoding="utf-8")[-3000:])


class Board:
    """A page of the web UI, operated by the labels that a user reads."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def open(self, address: str, theme: str = "light") -> Board:
        self.page.goto(f"{address}/?__theme={theme}")
        self.page.get_by_label("Stage", exact=True).or_(
            self.page.get_by_label("训练阶段", exact=True)
        ).first.wait_for()
        # The host fills in language, time and folders after the page has loaded, over what is there.
        self.page.wait_for_function(f"[...document.querySelectorAll('input')].some(one => {DATED}.test(one.value))")
        self.page.wait_for_timeout(700)
        return self

    def block(self, label: str) -> Any:
        """The visible field of that label, with its help and its buttons."""
        return (
            self.page.locator(f'.block:not(:has(.block)):has([data-testid="block-info"]:text-is("{label}"))')
            .filter(visible=True)
            .first
        )

    def block_of_files(self, label: str) -> Any:
        """The visible list of files of that label."""
        return self.page.locator(f'.block:has(label:has-text("{label}"))').filter(visible=True).last

    def field(self, label: str) -> Any:
        """Where that field takes its input."""
        return self.block(label).locator("input, textarea").first

    def choose(self, label: str, option: str) -> None:
        from playwright.sync_api import TimeoutError

        wanted = self.page.get_by_role("option", name=option, exact=True).filter(visible=True).first
        for _ in range(ATTEMPTS):
            self.field(label).click()
            try:
                return wanted.click(timeout=10_000)
            except TimeoutError:  # an answer of the server came meanwhile and closed the list
                self.page.keyboard.press("Escape")
                self.field(label).blur()
        raise AssertionError(f"{label} does not offer {option}")

    def choose_several(self, label: str, *options: str) -> None:
        """Choose these and no others."""
        clear = self.block(label).get_by_title("Clear")
        if clear.count():
            clear.click()
        for option in options:
            self.choose(label, option)
        self.page.keyboard.press("Escape")

    def write(self, label: str, text: str) -> None:
        field = self.field(label)
        field.fill(text)
        field.press("Enter") if field.get_attribute("role") == "listbox" else field.blur()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).filter(visible=True).first.click()

    def open_section(self, title: str) -> None:
        self.page.get_by_text(title, exact=True).filter(visible=True).first.click()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()
