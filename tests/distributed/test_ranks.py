"""One rank, two ranks and every sharding give the same losses and parameters (real gloo ranks, real DeepSpeed)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from runs import CLI, base_config, command, logged, train, weights, write_yaml


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    tiny.save_llama(directory / "teacher", seed=1, width=48, layers=3)
    tiny.save_llama(directory / "student", seed=2)
    tiny.save_dataset(directory / "data")
    return directory


def zero_config(directory: Path, stage: int) -> str:
    """A DeepSpeed configuration in float32; `auto` is filled in by the trainer."""
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }
    path = directory / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    return str(path)


def on_two_ranks(config: dict, tmp_path: Path, arguments: list[str] | None = None) -> Path:
    config = {**config, "ddp_backend": "gloo", "per_device_train_batch_size": 4}
    env = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    path = write_yaml(tmp_path / f"{Path(config['output_dir']).name}.yaml", config)
    result = command([*(arguments or [CLI]), "train", str(path)], env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-12000:]
    return Path(config["output_dir"])


@pytest.fixture(scope="module")
def one_rank(root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one") / "out"
    return train(config_for(root, out, per_device_train_batch_size=8))


def config_for(root: Path, out: Path, **overrides) -> dict:
    return base_config(root, output_dir=str(out), max_steps=3, optim="sgd", learning_rate=0.05, **overrides)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "ddp, plug-in applied explicitly"])
def test_two_ranks_are_one_rank(root, one_rank, tmp_path, engine):
    overrides = {"deepspeed": zero_config(tmp_path, int(engine[-1]))} if engine.startswith("zero") else {}
    explicit = [sys.executable, "-m", "llamafactory_sekd"] if "explicitly" in engine else None
    out = on_two_ranks(config_for(root, tmp_path / "out", **overrides), tmp_path, explicit)
    for key in ("loss", "kd/ce", "kd/difficulty", "kd/hard_ratio"):
        assert logged(out, key) == pytest.approx(logged(one_rank, key), abs=2e-4), key
    ours, theirs = weights(out), weights(one_rank)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5)
