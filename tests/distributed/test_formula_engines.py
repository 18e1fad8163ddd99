"""A mapping, a user's function, and own samples by a mapping: two ranks under DDP, ZeRO-3 and FSDP2 are one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engines
from helpers.runs import base_config, logged, train, weights


pytestmark = pytest.mark.slow
FUNCTION = "def triangular(t, s):\n    return (t - s) ** 2 / (t + s)\n"
MAPPING = {
    "target": "teacher",
    "gate": {"signal": "teacher_probability", "below": "mean"},
    "easy": {"divergence": "reverse_kl", "weight": {"from": 0.5, "to": 1.0}},
    "hard": {"divergence": "jsd", "mix": 0.3, "temperature": 2.0, "lambda": 0.9},
}
OWN = {"kd_on_policy": 1.0, "max_new_tokens": 8}
RUNS: dict[str, dict[str, Any]] = {
    "mapping": {"kd_loss": MAPPING},
    "function": {"kd_loss": {"divergence": {"kl": 0.5, "my_losses:triangular": 1.0}, "skew": 0.7}},
    "own_samples": {"kd_loss": MAPPING, **OWN},
}


def jobs(root: Path, out: Path, ranks: int, **engine: Any) -> list[dict[str, Any]]:
    common = {
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_steps": 3,
        "per_device_train_batch_size": 8 // ranks,
        **engine,
    }
    return [base_config(root, output_dir=str(out / name), **common, **keys) for name, keys in RUNS.items()]


def working_directory(out: Path) -> Path:
    (out / "my_losses.py").write_text(FUNCTION)
    return out


@pytest.fixture(scope="module")
def one_rank(tiny_root, tmp_path_factory) -> Path:
    out = working_directory(tmp_path_factory.mktemp("one_rank"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(out)
        for config in jobs(tiny_root, out, ranks=1):
            train(config)
    return out


@pytest.fixture(scope="module")
def under_torchrun(tiny_root, tmp_path_factory) -> Path:
    out = working_directory(tmp_path_factory.mktemp("torchrun"))
    engine = {"ranks": 2, "ddp_backend": "gloo"}
    both = jobs(tiny_root, out / "ddp", **engine)
    both += jobs(tiny_root, out / "zero3", **engine, deepspeed=engines.zero_config(out, 3))
    engines.launch(both, out)
    return out


@pytest.fixture(scope="module")
def under_accelerate(tiny_root, tmp_path_factory) -> Path:
    out = working_directory(tmp_path_factory.mktemp("accelerate"))
    engine = {"ranks": 2, "ddp_backend": "gloo", "use_cpu": True}
    engines.launch(jobs(tiny_root, out / "fsdp2", **engine), out, env=engines.fsdp_environment(out, 2))
    return out


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_two_ranks_are_one_rank(one_rank, engine, run, request):
    launched = request.getfixturevalue("under_accelerate" if engine == "fsdp2" else "under_torchrun")
    two, one = launched / engine / run, one_rank / run
    for key in ("loss", "kd/ce", "kd/difficulty", "kd/hard_ratio", "kd/teacher_probability", "kd/gamma"):
        assert logged(two, key) == pytest.approx(logged(one, key), abs=2e-4), key
    assert len(logged(one, "loss")) == 3
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, atol=1e-5, rtol=1e-5)
