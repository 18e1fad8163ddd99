"""Training by the formula through the host: presets, a mapping, dotted keys, own functions, ranks and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import engines
from helpers.forks import forked
from helpers.runs import CLI, base_config, command, logged, train, weights, write_yaml

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.presets import PRESETS


MAPPING = {
    "target": "teacher",
    "gate": {"signal": "teacher_probability", "below": "mean"},
    "easy": {"divergence": "reverse_kl", "weight": {"from": 0.5, "to": 1.0}},
    "hard": {"divergence": "jsd", "mix": 0.3, "temperature": 2.0, "lambda": 0.9},
}


def run_cli(tmp_path: Path, config: dict, *overrides: str, run=forked):
    path = write_yaml(tmp_path / "run.yaml", config)
    return run([CLI, "train", str(path), *overrides], cwd=tmp_path)


def same_weights(first: Path, second: Path, tolerance: float = 1e-5) -> None:
    theirs = weights(second)
    for name, value in weights(first).items():
        torch.testing.assert_close(value, theirs[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kd_loss", PRESETS)
def test_every_preset_lowers_its_loss(tiny_root, tmp_path, kd_loss):
    keys = {"kd_topk": 0.5} if "kd_topk" in PRESETS[kd_loss].keys else {}
    out = tmp_path / "out"
    # The same batch in every step.
    train(
        base_config(tiny_root, output_dir=str(out), kd_loss=kd_loss, kd_lambda=0.9, max_samples=4, max_steps=5, **keys)
    )
    # The target of `taid` moves from the student to the teacher, and its loss with it.
    losses = logged(out, "kd/teacher_kl" if kd_loss == "taid" else "loss")
    assert len(losses) == 5
    assert losses[-1] < losses[0]


def test_a_mapping_in_the_yaml_trains_through_the_real_command_and_prints_its_expansion(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), kd_loss=MAPPING, max_samples=4)
    result = run_cli(tmp_path, config, "kd_loss.hard.mix=0.4", "kd_loss.gate.width=0.05", run=command)
    assert result.returncode == 0, result.stderr[-2000:]
    printed = (
        "kd_loss: {target: teacher, gate: {signal: teacher_probability, below: mean, width: 0.05}, "
        "easy: {divergence: reverse_kl, weight: {from: 0.5, to: 1}, lambda: 0.5}, "
        "hard: {divergence: jsd, mix: 0.4, lambda: 0.9, temperature: 2}}"
    )
    assert printed in result.stderr + result.stdout
    lines = (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "kd/difficulty" in record]
    assert records[0]["kd/gamma"] == 0.5  # the mean of no step yet
    assert records[1]["kd/gamma"] == pytest.approx(records[0]["kd/teacher_probability"], abs=1e-5)
    assert all(0 < record["kd/hard_ratio"] < 1 for record in records)


def test_a_function_of_the_users_own_trains_from_the_working_directory(tiny_root, tmp_path):
    (tmp_path / "my_losses.py").write_text("def squares(t, s):\n    return (t - s) ** 2\n")
    keys = {"kd_loss": {"divergence": "my_losses:squares"}, "max_samples": 4, "learning_rate": 1e-2}
    result = run_cli(tmp_path, base_config(tiny_root, output_dir=str(tmp_path / "out"), **keys))
    assert result.returncode == 0, result.stderr[-2000:]
    losses = logged(tmp_path / "out", "loss")
    assert losses[-1] < losses[0]


def test_a_wrong_function_ends_the_run_in_one_line_before_a_model_is_read(tiny_root, tmp_path):
    (tmp_path / "my_losses.py").write_text("def total(t, s):\n    return ((t - s) ** 2).sum(-1)\n")
    config = base_config(
        tiny_root, output_dir=str(tmp_path / "out"), kd_loss={"divergence": "my_losses:total"}, teacher_model="/absent"
    )
    result = run_cli(tmp_path, config)
    assert result.returncode != 0
    assert "`my_losses:total` returned [2] for t and s of shape [2, 5]" in result.stderr


@pytest.mark.parametrize(
    ("kd_loss", "message"),
    [
        ({"esay": {}}, "`kd_loss: esay` is unknown: did you mean 'easy'"),
        ({"easy": {"divergence": "jsd", "mix": 2}}, r"`kd_loss.easy.mix: 2` cannot be used: use a number from 0 to 1"),
        ('{"preset": "jds"}', "`kd_loss.preset: jds` is unknown: did you mean 'jsd'"),
        ("{easy: [", "cannot be read as a mapping"),
        ({"gate": {"signal": "difficulty", "above": 1}, "easy": {}}, "`kd_loss.gate` needs `kd_loss.hard`"),
    ],
)
def test_a_mapping_that_cannot_work_is_refused_by_name(tiny_root, tmp_path, kd_loss, message):
    with pytest.raises(ArgumentError, match=message):
        train(base_config(tiny_root, output_dir=str(tmp_path / "out"), kd_loss=kd_loss))


def test_a_preset_is_changed_by_a_mapping_that_names_it(tiny_root, tmp_path):
    short = {"preset": "verified_reference", "gate": {"below": 0.2}}
    full = {
        "gate": {"signal": "teacher_probability", "below": 0.2},
        "easy": {"divergence": "kl", "lambda": 0.3},
        "hard": {"divergence": "kl", "lambda": 1},
    }
    for name, kd_loss in (("short", short), ("full", full)):
        train(base_config(tiny_root, output_dir=str(tmp_path / name), kd_loss=kd_loss, kd_lambda=0.3, max_steps=2))
    same_weights(tmp_path / "short", tmp_path / "full", 0.0)


@pytest.mark.parametrize(
    "kd_loss", [MAPPING, {"preset": "entropy_forward", "gate": {"width": 0.5}}], ids=["mean", "soft"]
)
def test_accumulation_changes_neither_losses_nor_parameters(tiny_root, tmp_path, kd_loss):
    for size in (2, 8):
        train(
            base_config(
                tiny_root,
                output_dir=str(tmp_path / str(size)),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
                max_steps=3,
                kd_loss=kd_loss,
            )
        )
    assert logged(tmp_path / "2", "loss") == pytest.approx(logged(tmp_path / "8", "loss"), abs=2e-4)
    same_weights(tmp_path / "2", tmp_path / "8")


def test_a_resumed_run_ends_with_the_parameters_of_an_uninterrupted_one(tiny_root, tmp_path):
    keys = {"kd_loss": MAPPING, "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    train(base_config(tiny_root, output_dir=str(tmp_path / "complete"), **keys))
    checkpoint = str(tmp_path / "complete" / "checkpoint-2")
    train(base_config(tiny_root, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=checkpoint, **keys))
    for key in ("kd/gamma", "kd/teacher_probability"):
        assert logged(tmp_path / "resumed", key) == pytest.approx(logged(tmp_path / "complete", key))
    same_weights(tmp_path / "resumed", tmp_path / "complete")


def test_on_own_samples_lambda_is_1_on_both_sides_of_the_gate(tiny_root, tmp_path):
    """What the student wrote itself is no reference."""
    alone = {**MAPPING, "easy": {**MAPPING["easy"], "lambda": 1.0}, "hard": {**MAPPING["hard"], "lambda": 1.0}}
    for name, kd_loss in (("mapping", MAPPING), ("alone", alone)):
        keys = {"kd_loss": kd_loss, "kd_on_policy": 1.0, "max_new_tokens": 8, "max_steps": 2}
        train(base_config(tiny_root, output_dir=str(tmp_path / name), **keys))
    assert logged(tmp_path / "mapping", "loss") == logged(tmp_path / "alone", "loss")
    same_weights(tmp_path / "mapping", tmp_path / "alone", 0.0)


@pytest.mark.slow
def test_two_ranks_are_one_for_a_gate_by_mean_and_select_for_themselves_for_a_gate_by_share(tiny_root, tmp_path):
    """A share is that of the micro-batch of a rank: with two ranks it is what two accumulated micro-batches select."""
    share = {**MAPPING, "gate": {"signal": "teacher_entropy", "share": 0.3}}
    jobs = []
    for name, kd_loss in (("mean", MAPPING), ("share", share)):
        common = {"kd_loss": kd_loss, "max_steps": 3, "optim": "sgd", "learning_rate": 0.05, "disable_shuffling": True}
        one = base_config(
            tiny_root,
            output_dir=str(tmp_path / f"{name}1"),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            **common,
        )
        train(one)
        # Ranks take turns at the samples, and so do the accumulated micro-batches of one rank.
        two = {**one, "output_dir": str(tmp_path / f"{name}2"), "gradient_accumulation_steps": 1}
        jobs.append({**two, "ddp_backend": "gloo"})
    engines.launch(jobs, tmp_path)
    for name in ("mean", "share"):
        for key in ("loss", "kd/ce", "kd/hard_ratio"):
            expected = logged(tmp_path / f"{name}1", key)
            assert logged(tmp_path / f"{name}2", key) == pytest.approx(expected, abs=2e-4)
        same_weights(tmp_path / f"{name}1", tmp_path / f"{name}2")
