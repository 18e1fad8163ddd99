"""A run that learns nothing says so."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import base_config, train
from transformers import TrainerControl, TrainerState, TrainingArguments

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.trainer.health import WarnOfIdleRun


def run(root, out, **keys):
    return train(base_config(root, output_dir=str(out), **keys))


def test_a_gradient_of_exactly_zero_is_told(tiny_root, tmp_path, said):
    run(tiny_root, tmp_path, kd_loss="skew", kd_beta=1e-60, max_steps=2)  # the proxy is the target
    assert "is exactly zero: the student learns nothing" in said.text


def test_a_loss_that_is_not_finite_is_told(tiny_root, tmp_path, said):
    run(tiny_root, tmp_path, kd_loss="forward_kl", learning_rate=1e30, max_steps=3)
    assert "is not finite: the weights no longer improve" in said.text


@pytest.mark.parametrize(("gamma", "words"), [(-1.0, "More than 98%"), (1e9, "Less than 2%")])
def test_a_share_of_hard_tokens_that_says_nothing_is_told(tiny_root, tmp_path, said, gamma, words):
    run(tiny_root, tmp_path, kd_gamma=gamma, max_steps=3)
    assert words in said.text
    assert "docs/choose.md" in said.text.replace("\n", " ")


@pytest.mark.parametrize(
    ("kd_loss", "words"),
    [
        ({"preset": "self_evolution", "gate": {"above": 1e9}}, "Less than 2%"),
        ({"preset": "entropy_forward", "gate": {"above": 99}}, "`easy` of `kd_loss` is the loss of nearly all"),
        ({"preset": "acceptance_gate", "gate": {"above": 2}}, "the student learns from hardly any token"),
        ({"preset": "entropy_forward", "gate": {"above": -1}}, "`hard` of `kd_loss` is the loss of nearly all"),
    ],
    ids=str,
)
def test_a_gate_of_any_objective_that_selects_nearly_all_tokens_or_none_is_told(
    tiny_root, tmp_path, said, kd_loss, words
):
    run(tiny_root, tmp_path, kd_loss=kd_loss, max_steps=3)
    assert words in said.text
    assert "kd_gamma" not in said.text


@pytest.mark.parametrize("logging_steps", [1, 50])
def test_a_run_that_breaks_is_told_where_the_host_keeps_it_out_of_the_log(tiny_root, tmp_path, said, logging_steps):
    keys = {"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 3, "logging_steps": logging_steps}
    run(tiny_root, tmp_path, kd_loss="forward_kl", **keys)
    assert "The weights are not finite after 3 steps" in said.text
    assert ("the last 1 steps is not finite" in said.text) == (logging_steps == 1)
    assert "exactly zero" not in said.text


def test_a_run_without_a_log_whose_loss_is_zero_is_told_though_its_weights_decay(tiny_root, tmp_path, said):
    keys = {"teacher_model": str(tiny_root / "student"), "kd_loss": "forward_kl", "kd_lambda": 1.0}
    run(tiny_root, tmp_path, weight_decay=0.1, logging_steps=50, max_steps=2, **keys)
    assert "The mean loss of the run is zero: the student learns nothing" in said.text
    assert "No weight has moved" not in said.text


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("keys", [{"learning_rate": 1e-12}, {"adam_epsilon": 1e12}], ids=["rate", "epsilon"])
def test_weights_that_do_not_move_are_told(tiny_root, tmp_path, said, steps, keys):
    run(tiny_root, tmp_path, max_steps=steps, **keys)
    assert f"No weight has moved in {min(steps, 3)} steps" in said.text


@pytest.mark.parametrize(("rate", "told"), [(1e-5, True), (1e-2, False)])
def test_steps_that_bfloat16_rounds_away_are_told(tmp_path, said, rate, told):
    """The host allows `pure_bf16` on accelerators alone, so the callback watches a loop of its own here."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(8))).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, logging_steps=1)
    state, control = TrainerState(max_steps=4), TrainerControl()
    watch = WarnOfIdleRun(DistillationArguments())
    watch.on_train_begin(args, state, control, model=model)
    for step in range(1, 5):
        loss = model(torch.randn(4, 16, dtype=torch.bfloat16)).square().mean()
        loss.backward()
        optimizer.step()
        state.global_step = step
        state.log_history.append({"loss": loss.item(), "grad_norm": 1.0, "learning_rate": rate})
        watch.on_log(args, state, control, logs=state.log_history[-1])
    watch.on_train_end(args, state, control)
    assert ("of the weights have moved" in said.text) == told
    assert said.text.count("moved") == told


def test_a_warm_up_that_is_longer_than_the_run_is_told(tiny_root, tmp_path, said):
    run(tiny_root, tmp_path, max_steps=2, warmup_steps=9, lr_scheduler_type="linear")
    assert "warms up for 9 steps, and the run has 2" in said.text


def test_a_teacher_that_is_the_student_is_told_where_nothing_is_left_to_learn(tiny_root, tmp_path, said):
    run(
        tiny_root, tmp_path, teacher_model=str(tiny_root / "student"), kd_loss="forward_kl", kd_lambda=1.0, max_steps=2
    )
    assert "`teacher_model` (is it the student?)" in said.text


def test_a_healthy_run_is_not_warned_of(tiny_root, tmp_path, said):
    run(tiny_root, tmp_path, kd_loss="forward_kl", max_steps=4)
    assert "learns nothing" not in said.text
    assert "warms up" not in said.text
    assert "finite" not in said.text


@pytest.mark.parametrize(
    "keys",
    [
        {"kd_beta": 0.0},
        {"kd_loss": "skew", "kd_beta": 0.0, "kd_beta_end": 0.0},
        {"kd_temperature": 1e-8},
        {"kd_temperature": 1e30},
    ],
)
def test_keys_with_which_nothing_can_be_learned_are_refused(tiny_root, tmp_path, keys):
    with pytest.raises(ArgumentError, match=r"`kd_(beta|temperature)"):
        run(tiny_root, tmp_path, **keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"max_steps": 0},
        {"num_train_epochs": 0, "max_steps": -1},
        {"per_device_train_batch_size": 0},
        {"gradient_accumulation_steps": 0},
        {"cutoff_len": 0},
        {"max_samples": 0},
        {"lora_rank": 0, "finetuning_type": "lora"},
        {"freeze_trainable_layers": 0, "finetuning_type": "freeze"},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_amounts_of_the_host_with_which_nothing_is_trained_are_refused_by_name(tiny_root, tmp_path, keys):
    with pytest.raises(ArgumentError, match=next(iter(keys))):
        run(tiny_root, tmp_path, **keys)
