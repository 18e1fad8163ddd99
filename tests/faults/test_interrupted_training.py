"""Ctrl-C and a full disk end a training in one line; the same command goes on from the last complete checkpoint."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from helpers.forks import Fork, forked, wait_for
from helpers.runs import CLI, base_config, logged, weights, write_yaml


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
CONTINUES = "without `overwrite_output_dir: true` the same command goes on from the last complete checkpoint."
SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "overwrite_output_dir": False}


def said(stderr: str) -> list[str]:
    assert "Traceback" not in stderr, stderr[-3000:]
    return [line for line in stderr.splitlines() if line.startswith("llamafactory_sekd: ")]


@pytest.mark.parametrize("keys", [{}, {"kd_on_policy": 0.5, "max_new_tokens": 64}], ids=["references", "own samples"])
def test_ctrl_c_is_one_line_and_the_same_command_continues(tiny_root, tmp_path, keys):
    out = tmp_path / "out"
    config = base_config(tiny_root, output_dir=str(out), max_steps=400, use_cpu=True, **SAVING, **keys)
    process = Fork([CLI, "train", str(write_yaml(tmp_path / "x.yaml", config))])
    wait_for(lambda: (out / "checkpoint-2" / "trainer_state.json").exists(), process)
    process.send_signal(signal.SIGINT)
    ended = process.completed()
    assert ended.returncode != 0
    assert said(ended.stderr) == [f"llamafactory_sekd: interrupted; {CONTINUES}"]

    steps = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")) + 2
    again = forked([CLI, "train", str(write_yaml(tmp_path / "x.yaml", {**config, "max_steps": steps}))])
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(logged(out, "loss")) == steps


def test_a_run_on_own_samples_that_is_killed_ends_as_an_uninterrupted_one(tiny_root, tmp_path):
    """Killed between two drawings, whose samples are from weights that are gone."""
    keys = {"kd_on_policy": 1.0, "kd_on_policy_every": 50, "max_new_tokens": 12, "per_device_train_batch_size": 2}
    keys |= {"max_steps": 60, "use_cpu": True, "learning_rate": 0.01, **SAVING, "save_steps": 3}

    def config(name: str) -> str:
        return str(
            write_yaml(tmp_path / f"{name}.yaml", base_config(tiny_root, output_dir=str(tmp_path / name), **keys))
        )

    process = Fork([CLI, "train", config("killed")])
    wait_for(lambda: (tmp_path / "killed" / "checkpoint-9" / "trainer_state.json").exists(), process)
    process.send_signal(signal.SIGKILL)
    assert process.completed().returncode != 0
    assert not (tmp_path / "killed" / "checkpoint-51").exists()
    for name in ("killed", "complete"):
        done = forked([CLI, "train", config(name)])
        assert done.returncode == 0, done.stderr[-3000:]
    killed, complete = (weights(tmp_path / name) for name in ("killed", "complete"))
    assert all(torch.equal(killed[name], complete[name]) for name in complete)


def test_a_full_disk_is_one_line_and_the_same_command_continues_with_more_room(tiny_root, small_disk, tmp_path):
    config = base_config(tiny_root, output_dir=str(small_disk / "out"), max_steps=3, use_cpu=True, **SAVING)
    path = write_yaml(tmp_path / "x.yaml", config)
    full = forked([CLI, "train", str(path)])
    assert full.returncode != 0
    (line,) = said(full.stderr)
    assert line.startswith("llamafactory_sekd: error: no room to write (")
    assert line.endswith(f": free some; {CONTINUES}")

    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    again = forked([CLI, "train", str(path)])
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(logged(small_disk / "out", "loss")) == 3


def test_other_stages_keep_the_hosts_own_end(tiny_root, tmp_path):
    out = tmp_path / "out"
    config = base_config(tiny_root, output_dir=str(out), max_steps=400, use_cpu=True, **SAVING)
    config |= {"stage": "sft"}
    del config["teacher_model"]
    process = Fork([CLI, "train", str(write_yaml(tmp_path / "x.yaml", config))])
    wait_for(lambda: (out / "checkpoint-2" / "trainer_state.json").exists(), process)
    process.send_signal(signal.SIGINT)
    ended = process.completed()
    assert "KeyboardInterrupt" in ended.stderr
    assert not any(line.startswith("llamafactory_sekd:") for line in ended.stderr.splitlines())
