"""An evaluation on a full disk, and one whose command is killed: nothing is lost, and the same command continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from helpers import tiny
from helpers.forks import Fork, forked, wait_for


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tmpfs and the kernel's death signal are Linux's")
CLI = str(Path(sys.executable).with_name("llamafactory-cli"))
SENTENCES = [f"the house of number {number} is red" for number in range(12)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Hold a model that translates nonsense, and a test set."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save_llama(folder / "model", seed=1)
    for suffix in ("en", "de"):
        (folder / f"en-de.{suffix}").write_text("".join(f"{line}\n" for line in SENTENCES))
    return folder


def config(inputs: Path, save_dir: Path, **keys) -> dict:
    return {
        "task": "wmt22",
        "task_dir": str(inputs),
        "directions": ["en-de"],
        "template": "parrot",
        "systems": {"one": {"model_name_or_path": str(inputs / "model")}},
        "metrics": ["bleu"],
        "max_new_tokens": 64,
        "batch_size": 1,
        "save_dir": str(save_dir),
        **keys,
    }


def write(path: Path, keys: dict) -> Path:
    path.write_text(yaml.safe_dump(keys))
    return path


@pytest.mark.parametrize("left", [0, 8192])
def test_a_full_disk_is_one_line_leaves_nothing_behind_and_the_same_command_works_afterwards(
    inputs, small_disk, tmp_path, left
):
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(bytes(free - left))
    path = write(tmp_path / "eval.yaml", config(inputs, small_disk / "results"))
    full = forked([CLI, "eval", str(path)])
    assert full.returncode == 2, full.stderr[-3000:]
    assert "Traceback" not in full.stderr
    said = [line for line in full.stderr.splitlines() if "error:" in line]
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert not [found for found in small_disk.rglob("*") if found.name.endswith((".partial", ".tmp"))]

    ballast.unlink()
    again = forked([CLI, "eval", str(path)])
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads((small_disk / "results" / "results.json").read_text())["systems"]["one"]["scores"]


def test_ctrl_c_is_one_line_and_the_same_command_continues(inputs, tmp_path):
    path = write(tmp_path / "eval.yaml", config(inputs, tmp_path / "results"))
    process = Fork([CLI, "eval", str(path)])
    parts = tmp_path / "results" / "hypotheses" / "one"
    wait_for(lambda: list(parts.glob(".en-de.partial.*.jsonl")), process)
    process.send_signal(signal.SIGINT)
    ended = process.completed()
    assert ended.returncode == 130
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("llamafactory-cli eval: interrupted; what is translated is kept") == 1

    again = forked([CLI, "eval", str(path)])
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"of {len(SENTENCES)} are done" in again.stderr


def test_ranks_end_with_a_command_that_is_killed_and_the_same_command_continues(inputs, tmp_path):
    path = write(tmp_path / "eval.yaml", config(inputs, tmp_path / "results"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    process = subprocess.Popen([CLI, "eval", str(path)], env=environment, stdout=-3, stderr=-3)
    parts = tmp_path / "results" / "hypotheses" / "one"
    deadline = time.monotonic() + 1200
    while not list(parts.glob(".en-de.partial.*.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # torchrun and two ranks
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=1200)
    assert not alive
    assert not (tmp_path / "results" / "results.json").exists()

    again = forked([CLI, "eval", str(path)])
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"of {len(SENTENCES)} are done" in again.stderr
