"""Killed in a step or in any file of a checkpoint, the same command ends with an uninterrupted run's parameters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.runs import CLI, base_config, command, logged, weights, write_yaml


SEQUENCE = Path(__file__).parents[1] / "helpers" / "run_sequence.py"
KILLS = ["in_a_step", "in_the_weights", "in_the_optimizer", "in_our_state", "in_the_trainer_state"]
# Several epochs of three steps, a β that moves, dropout, a metrics window that a checkpoint cuts, old ones deleted.
SCHEDULE = {
    "max_samples": 12,
    "max_steps": 8,
    "kd_loss": "skew",
    "kd_beta_end": 1.0,
    "logging_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "overwrite_output_dir": False,
    "finetuning_type": "lora",
    "lora_target": "all",
    "lora_dropout": 0.3,
}


@pytest.fixture(scope="module")
def outcomes(tiny_root, tmp_path_factory) -> tuple[Path, dict[str, tuple[int, int]]]:
    """Every run, each in a fork: uninterrupted, then killed and started again. Exit statuses by kind of kill."""
    root = tmp_path_factory.mktemp("kills")
    jobs = []
    for kill in ["complete", *KILLS, "after_the_checkpoint", "disk_full"]:
        out = root / kill
        config = base_config(tiny_root, output_dir=str(out), **SCHEDULE)
        if kill != "complete":
            jobs.append({"config": config, "kill": kill, "log": str(root / f"{kill}.killed.log")})
        jobs.append({"config": config, "log": str(root / f"{kill}.log")})

    (root / "runs.json").write_text(json.dumps(jobs))
    result = command([sys.executable, str(SEQUENCE), str(root / "runs.json")], timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    statuses = json.loads(result.stdout.splitlines()[-1].removeprefix("statuses "))
    by_kill: dict[str, list[int]] = {}
    for job, status in zip(jobs, statuses, strict=True):
        by_kill.setdefault(Path(job["config"]["output_dir"]).name, []).append(status)
    return root, {name: tuple(values) for name, values in by_kill.items()}


def assert_like_uninterrupted(root: Path, name: str) -> None:
    complete, resumed = root / "complete", root / name
    for key, value in weights(complete).items():
        torch.testing.assert_close(weights(resumed)[key], value, atol=1e-7, rtol=1e-7)
    assert logged(resumed, "kd/beta") == logged(complete, "kd/beta")
    for key in ("kd/difficulty", "kd/ce", "kd/hard_ratio"):  # the windows that the kill cut are complete again
        assert logged(resumed, key) == pytest.approx(logged(complete, key), abs=2e-6), key


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
def test_killed_anywhere_and_started_again_it_ends_like_an_uninterrupted_run(outcomes, kill):
    root, statuses = outcomes
    assert statuses[kill] == (-signal.SIGKILL, 0), (root / f"{kill}.log").read_text()[-3000:]
    assert_like_uninterrupted(root, kill)


@pytest.mark.parametrize("kill", KILLS[1:])
def test_a_half_written_checkpoint_is_skipped_with_one_line(outcomes, kill):
    root, _ = outcomes
    lines = [line for line in (root / f"{kill}.log").read_text().splitlines() if "interrupted" in line]
    assert len(lines) == 1
    assert lines[0].startswith("llamafactory_sekd: checkpoint-4 in ")
    assert lines[0].endswith("the training resumes from checkpoint-2.")


def test_a_complete_checkpoint_is_not_skipped(outcomes):
    root, statuses = outcomes
    assert statuses["after_the_checkpoint"] == (-signal.SIGKILL, 0)
    log = (root / "after_the_checkpoint.log").read_text()
    assert "interrupted" not in log
    assert "checkpoint-4" in log
    assert_like_uninterrupted(root, "after_the_checkpoint")


def test_a_full_disk_stops_the_run_and_loses_only_what_came_after_the_last_complete_checkpoint(outcomes):
    root, statuses = outcomes
    assert statuses["disk_full"] == (1, 0)
    assert "File too large" in (root / "disk_full.killed.error").read_text()
    assert_like_uninterrupted(root, "disk_full")


@pytest.mark.slow
def test_the_real_command_killed_from_outside_and_repeated_ends_like_an_uninterrupted_one(outcomes, tiny_root):
    root, _ = outcomes
    out = root / "outside"
    config = base_config(tiny_root, output_dir=str(out), **SCHEDULE)
    path = write_yaml(root / "outside.yaml", config)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([CLI, "train", str(path)], env=environment, stdout=-3, stderr=-3, cwd=root)
    deadline = time.time() + 1200
    while not (out / "checkpoint-2" / "trainer_state.json").exists() and time.time() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL  # it had not ended by itself
    result = command([CLI, "train", str(path)], cwd=root)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_like_uninterrupted(root, "outside")
