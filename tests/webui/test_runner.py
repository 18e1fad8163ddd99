from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch  # noqa: F401  (registers the plug-in, as in every process of the host)

from llamafactory_sekd.host.webui_page import SharedChild


def child(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def test_every_page_that_watches_a_run_gets_its_end_and_its_messages():
    shared = SharedChild.of(child("import sys, time; time.sleep(0.6); print('why', file=sys.stderr); sys.exit(3)"))
    assert SharedChild.of(shared) is shared
    ends: list[tuple[str, int | None]] = []

    def watch() -> None:
        while True:
            try:
                ends.append((shared.communicate(timeout=0.1)[1], shared.returncode))
                return
            except subprocess.TimeoutExpired:
                continue

    pages = [threading.Thread(target=watch) for _ in range(4)]
    for page in pages:
        page.start()
    for page in pages:
        page.join(timeout=20)
    assert ends == [("why\n", 3)] * 4


def test_a_page_that_waits_for_another_waits_no_longer_than_it_said():
    shared = SharedChild.of(child("import time; time.sleep(30)"))

    def read() -> None:
        with pytest.raises(subprocess.TimeoutExpired):
            shared.communicate(timeout=2.0)

    reader = threading.Thread(target=read)
    reader.start()
    with pytest.raises(subprocess.TimeoutExpired):
        shared.communicate(timeout=0.05)
    reader.join()
    shared.child.kill()
    assert shared.communicate(timeout=10)
