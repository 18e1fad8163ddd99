"""Two launchers that meet are one run; a launcher or a rank that is killed ends the run, which resumes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import engines
from helpers.runs import CLI, base_config, command, logged, train, weights, write_yaml


pytestmark = pytest.mark.slow
STEPS = {"max_steps": 16, "optim": "sgd", "learning_rate": 0.05, "kd_loss": "skew", "kd_beta_end": 1.0}


@pytest.fixture(scope="module")
def one_rank(tiny_root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one") / "out"
    return train(base_config(tiny_root, output_dir=str(out), per_device_train_batch_size=8, **STEPS))


def assert_same(out: Path, one_rank: Path) -> None:
    for key in ("loss", "kd/beta", "kd/difficulty"):
        assert logged(out, key) == pytest.approx(logged(one_rank, key), abs=2e-4), key
    for name, value in weights(one_rank).items():
        torch.testing.assert_close(weights(out)[name], value, atol=1e-5, rtol=1e-5)


def test_two_nodes_are_one_rank(tiny_root, one_rank, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), ddp_backend="gloo", **STEPS)
    path = write_yaml(tmp_path / "run.yaml", config)
    nodes = {"FORCE_TORCHRUN": "1", "NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1"}
    nodes["MASTER_PORT"] = str(engines.free_port())
    launchers = [
        subprocess.Popen(
            [CLI, "train", str(path)],
            env={**engines.environment(), **nodes, "NODE_RANK": str(rank)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for launcher in launchers:
            output, _ = launcher.communicate(timeout=1800)
            assert launcher.returncode == 0, output[-3000:]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert_same(tmp_path / "out", one_rank)


def kill_launcher_after_a_step(arguments: list[str], env: dict[str, str], checkpoint: Path) -> list[psutil.Process]:
    """Start two ranks, kill the process that started them after a checkpoint, and return all that it had started."""
    with (checkpoint.parents[1] / "killed.log").open("wb") as log:
        launcher = psutil.Popen(arguments, env=env, cwd=checkpoint.parents[1], stdout=log, stderr=log)
    deadline = time.time() + 1200
    family: list[psutil.Process] = []
    while not (checkpoint / "trainer_state.json").exists() and time.time() < deadline:
        time.sleep(0.002)
        if len(family) < 3:  # looking takes longer than a step, so not when the time has come
            family = launcher.children(recursive=True)
    launcher.kill()
    assert launcher.wait() == -signal.SIGKILL  # it had not ended by itself
    return family


def test_a_run_whose_rank_and_then_whose_launcher_was_killed_is_resumed_by_the_same_command(
    tiny_root, one_rank, tmp_path
):
    saving = {"save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": False, "ddp_backend": "gloo"}
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), **STEPS, **saving)
    path = write_yaml(tmp_path / "run.yaml", config)
    ranks = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "MASTER_PORT": str(engines.free_port())}

    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([{"config": config, "kill": "in_a_step_of_rank_1"}]))
    killed = command(engines.torchrun(engines.SEQUENCE, str(jobs)), cwd=tmp_path)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr or "Signal 9" in killed.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()

    shutil.copytree(tmp_path / "out", tmp_path / "before")
    for _ in range(4):  # on a busy machine it may have ended before we come to kill it
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "before", tmp_path / "out")
        family = kill_launcher_after_a_step(
            [CLI, "train", str(path)], {**engines.environment(), **ranks}, tmp_path / "out" / "checkpoint-6"
        )
        assert len(family) >= 3  # torchrun, which is killed with it, and the ranks, which are killed with torchrun
        _, left = psutil.wait_procs(family, timeout=1200)
        assert not left
        if not (tmp_path / "out" / "model.safetensors").exists():
            break
    else:
        pytest.fail("the training ended four times before its launcher could be killed")

    again = command([sys.executable, "-m", "llamafactory_sekd", "train", str(path)], env=ranks, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same(tmp_path / "out", one_rank)
