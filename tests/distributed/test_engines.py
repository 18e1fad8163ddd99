"""Two ranks under every engine are one rank: losses, metrics and parameters of every objective, epochs and evaluation.

The reference is one rank with the complete batch, except for the test that compares accumulation.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from helpers import engines
from helpers.runs import base_config, command, logged, train, weights

from llamafactory_sekd.arguments import TOKEN_TABLE


pytestmark = pytest.mark.slow
ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"]
RUNS = [*engines.PER_TOKEN, "uneven"]


@pytest.fixture(scope="module")
def root(tiny_root, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("engines")
    for name in ("teacher", "student"):
        (directory / name).symlink_to(tiny_root / name)
    (directory / "data").mkdir()
    for path in (tiny_root / "data").iterdir():
        (directory / "data" / path.name).write_bytes(path.read_bytes())
    engines.save_uneven_dataset(directory / "data")
    engines.save_adapter(directory)
    return directory


@pytest.fixture(scope="module")
def one_rank(root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one_rank")
    for config in engines.trainings(root, out, ranks=1):
        train(config)
    (shared,) = (config for config in engines.teachers(root, out, ranks=1) if config["teacher_model"] == "self")
    train(shared)
    return out


@pytest.fixture(scope="module")
def under_torchrun(root, tmp_path_factory) -> Path:
    """DDP and the three stages of ZeRO, one after the other in one launch."""
    out = tmp_path_factory.mktemp("torchrun")
    jobs = engines.trainings(root, out / "ddp", ranks=2, ddp_backend="gloo")
    jobs += engines.teachers(root, out / "ddp", ranks=2, ddp_backend="gloo")
    for stage in (1, 2, 3):
        deepspeed = engines.zero_config(out, stage)
        engine = {"ranks": 2, "ddp_backend": "gloo", "deepspeed": deepspeed}
        jobs += engines.trainings(root, out / f"zero{stage}", **engine)
        if stage > 1:
            jobs += engines.teachers(root, out / f"zero{stage}", zero=stage, **engine)
    engines.launch(jobs, out)
    return out


@pytest.fixture(scope="module")
def fsdp1(root, tmp_path_factory) -> Path:
    return under_fsdp(1, root, tmp_path_factory.mktemp("fsdp1"))


@pytest.fixture(scope="module")
def fsdp2(root, tmp_path_factory) -> Path:
    return under_fsdp(2, root, tmp_path_factory.mktemp("fsdp2"))


def under_fsdp(version: int, root: Path, out: Path) -> Path:
    engine = {"ranks": 2, "ddp_backend": "gloo", "use_cpu": True}
    jobs = engines.trainings(root, out, fsdp1=version == 1, **engine)
    if version == 2:
        jobs += [config for config in engines.teachers(root, out, **engine) if config["teacher_model"] == "self"]
    if version == 1:  # the launcher itself, once
        launched = command(engines.accelerate(engines.fsdp_config(out, 1), *engines.sequence(jobs, out)), cwd=out)
        assert launched.returncode == 0, launched.stderr[-6000:]
    else:
        engines.launch(jobs, out, env=engines.fsdp_environment(out, 2))
    return out


def out_of(engine: str, request: pytest.FixtureRequest) -> Path:
    if engine.startswith("fsdp"):
        return request.getfixturevalue(engine)

    return request.getfixturevalue("under_torchrun") / engine


@pytest.fixture(scope="module", params=ENGINES)
def two_ranks(request) -> Path:
    return out_of(request.param, request)


def assert_same(first: Path, second: Path) -> None:
    for key in ("loss", "kd/ce", "kd/difficulty", "kd/hard_ratio", "kd/agreement"):
        assert logged(first, key) == pytest.approx(logged(second, key), abs=2e-4), key
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5)
    for key in ("kd/gamma", "kd/hard_scale"):  # where they follow the training
        assert logged(first, key) == pytest.approx(logged(second, key), rel=1e-4), key
    assert occurrences(first) == occurrences(second)


def occurrences(out: Path) -> dict[str, str]:
    with (out / TOKEN_TABLE).open(encoding="utf-8", newline="") as file:
        return {row["id"]: row["count"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_are_one_rank(one_rank, two_ranks, run):
    assert_same(two_ranks / run, one_rank / run)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "fsdp1"])
def test_own_samples_of_two_ranks_are_those_of_one(one_rank, engine, request):
    two_ranks = out_of(engine, request) / "on_policy"
    assert_same(two_ranks, one_rank / "on_policy")
    for key in ("kd/on_policy", "gen/length", "gen/truncated"):
        assert logged(two_ranks, key) == pytest.approx(logged(one_rank / "on_policy", key)), key


# Engine of the student -> where its teacher is placed.
TEACHERS = {
    "ddp": ["shared", "device", "offloaded"],
    "zero2": ["shared", "device", "offloaded", "own_engine"],
    "zero3": ["shared", "offloaded", "own_engine"],
    "fsdp2": ["shared"],
}


@pytest.mark.parametrize(("engine", "teacher"), [(name, teacher) for name in TEACHERS for teacher in TEACHERS[name]])
def test_two_ranks_are_one_rank_wherever_the_teacher_is_placed(one_rank, engine, teacher, request):
    reference = "shared" if teacher == "shared" else "self_evolution"
    assert_same(out_of(engine, request) / teacher, one_rank / reference)


def test_evaluation_counts_every_record_once(one_rank, two_ranks):
    for key in ("eval_loss", "eval_kd/difficulty", "eval_kd/ce"):
        assert logged(two_ranks / "uneven", key) == pytest.approx(logged(one_rank / "uneven", key), abs=1e-5), key


def test_accumulation_is_one_batch_over_complete_epochs_of_uneven_data(root, one_rank, tmp_path):
    config = engines.trainings(root, tmp_path, ranks=1, fsdp1=True)[-1]
    train({**config, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    assert_same(tmp_path / "uneven", one_rank / "uneven")


def test_topk_selects_within_each_micro_batch(root, tmp_path):
    # By its definition: the share of the hard tokens is the same, which tokens they are is not.
    keys = {"kd_loss": "self_evolution_topk", "kd_topk": 0.5, "max_steps": 2}
    for size in (8, 2):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        train(base_config(root, output_dir=str(tmp_path / str(size)), **keys, **batch))
    assert logged(tmp_path / "2", "kd/difficulty")[0] == pytest.approx(logged(tmp_path / "8", "kd/difficulty")[0])
    assert logged(tmp_path / "2", "kd/hard_ratio")[0] == pytest.approx(0.5, abs=0.05)
    assert logged(tmp_path / "2", "loss")[0] != pytest.approx(logged(tmp_path / "8", "loss")[0], abs=1e-3)
