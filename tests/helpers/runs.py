"""Runs of the host on tiny models: in this process (fast), or through the real command in a subprocess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from safetensors.torch import load_file


CLI = str(Path(sys.executable).with_name("llamafactory-cli"))


def base_config(root: Path, **overrides: Any) -> dict[str, Any]:
    """A complete training configuration over the models and data that the fixture `tiny_root` saved."""
    config = {
        "model_name_or_path": str(root / "student"),
        "stage": "sekd",
        "teacher_model": str(root / "teacher"),
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "tiny",
        "dataset_dir": str(root / "data"),
        "template": "parrot",
        "cutoff_len": 400,
        "overwrite_output_dir": True,
        "overwrite_cache": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 1.0e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **overrides,
    }
    return {key: value for key, value in config.items() if value is not None}


def train(config: dict[str, Any]) -> Path:
    """Run the host's own training function in this process and return the output folder."""
    from llamafactory.train.tuner import run_exp

    with patch.dict(os.environ):  # transformers leaves the precision of a run there for the next one
        run_exp(dict(config))

    return Path(config["output_dir"])


def command(
    arguments: list[str], *, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 1800
) -> subprocess.CompletedProcess[str]:
    """Run a command with one thread per process and return what it printed."""
    path = os.pathsep.join([str(Path(CLI).parent), os.environ["PATH"]])  # the host starts `torchrun` by its name
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(arguments, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout)


def write_yaml(path: Path, config: dict[str, Any]) -> Path:
    """Write a configuration where a command can read it."""
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def logged(output_dir: Path, key: str) -> list[float]:
    """The values of a metric over the steps, from trainer_state.json."""
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry[key] for entry in history if key in entry]


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    """The saved parameters, of the model or of its adapter."""
    names = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
    (path,) = (path for path in map(output_dir.joinpath, names) if path.exists())
    return torch.load(path, weights_only=True) if path.suffix == ".bin" else load_file(path)
