"""FSDP2 through `accelerate launch`, student and teacher sharded over two ranks, equals one rank."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from runs import CLI, base_config, command, logged, train, weights, write_yaml


pytestmark = pytest.mark.slow


def test_fsdp2_on_two_ranks_is_one_rank(tmp_path):
    tiny.save_llama(tmp_path / "teacher", seed=1, width=48, layers=3)
    tiny.save_llama(tmp_path / "student", seed=2)
    tiny.save_dataset(tmp_path / "data")
    steps = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.05}
    one = train(base_config(tmp_path, output_dir=str(tmp_path / "one"), per_device_train_batch_size=8, **steps))

    accelerate = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": True,
        },
        "machine_rank": 0,
        "num_machines": 1,
        "num_processes": 2,
        "use_cpu": True,
        "mixed_precision": "no",
    }
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump(accelerate))
    config = base_config(tmp_path, output_dir=str(tmp_path / "two"), ddp_backend="gloo", use_cpu=True, **steps)
    path = write_yaml(tmp_path / "two.yaml", config)
    result = command(
        [
            str(Path(sys.executable).with_name("accelerate")),
            "launch",
            "--config_file",
            str(tmp_path / "fsdp2.yaml"),
            CLI,
            "train",
            str(path),
        ],
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    two = tmp_path / "two"
    for key in ("loss", "kd/ce", "kd/difficulty"):
        assert logged(two, key) == pytest.approx(logged(one, key), abs=2e-4), key
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, atol=1e-5, rtol=1e-5)
