"""Training through the host: the loss is the paper's, whatever the batching, packing, student type or interruption."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import naive_step
from helpers.runs import CLI, base_config, command, logged, train, weights, write_yaml

from llamafactory_sekd.arguments import TOKEN_TABLE
from llamafactory_sekd.errors import DataError


def assert_same_weights(first: Path, second: Path, tolerance: float = 1e-5) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=tolerance, rtol=tolerance)


def test_the_real_command_logs_the_loss_of_the_papers_equations(tiny_root, tmp_path):
    config = base_config(
        tiny_root,
        output_dir=str(tmp_path / "out"),
        max_samples=8,
        per_device_train_batch_size=8,
        max_steps=1,
        plot_loss=True,
    )
    result = command([CLI, "train", str(write_yaml(tmp_path / "x.yaml", config))], cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]

    expected = naive_step.self_evolution(tiny_root, 8)
    (record,) = [
        json.loads(line)
        for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()
        if "kd/difficulty" in line
    ]
    assert record["loss"] == pytest.approx(expected["loss"], abs=1e-4)  # the host rounds to four digits
    assert record["kd/difficulty"] == pytest.approx(expected["kd/difficulty"], abs=1e-4)
    assert record["kd/hard_ratio"] == pytest.approx(expected["kd/hard_ratio"], abs=1e-6)
    assert (tmp_path / "out" / "training_kd.png").stat().st_size > 5000
    assert not list((tmp_path / "out").glob("*teacher*"))


def test_forward_kl_without_a_teachers_share_is_the_hosts_sft(tiny_root, tmp_path):
    sft = base_config(tiny_root, output_dir=str(tmp_path / "sft"), stage="sft", teacher_model=None)
    ours = base_config(tiny_root, output_dir=str(tmp_path / "ours"), kd_loss="forward_kl", kd_lambda=0.0)
    train(sft)
    train(ours)
    assert logged(tmp_path / "ours", "loss") == pytest.approx(logged(tmp_path / "sft", "loss"), abs=2e-4)
    assert_same_weights(tmp_path / "ours", tmp_path / "sft")


@pytest.mark.parametrize(
    "keys",
    [
        {"kd_loss": "self_evolution"},
        {"kd_loss": "self_evolution", "kd_gamma": "auto", "kd_hard_scale": "balanced"},
        {"kd_loss": "forward_kl"},
        {"kd_loss": "reverse_kl"},
        {"kd_loss": "skew_teacher"},
    ],
    ids=lambda keys: " ".join(keys.values()),
)
def test_accumulation_changes_neither_losses_nor_parameters(tiny_root, tmp_path, keys):
    for size in (1, 2, 8):
        train(
            base_config(
                tiny_root,
                output_dir=str(tmp_path / str(size)),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
                max_steps=3,
                **keys,
            )
        )

    for size in (1, 2):
        for key in ("loss", "kd/ce", "kd/difficulty"):
            assert logged(tmp_path / str(size), key) == pytest.approx(logged(tmp_path / "8", key), abs=2e-4)
        assert_same_weights(tmp_path / str(size), tmp_path / "8")


@pytest.mark.parametrize(
    "student",
    [
        {"kd_loss": "self_evolution", "kd_gamma": "auto", "kd_hard_scale": "balanced"},
        {"finetuning_type": "lora", "lora_target": "all", "lora_dropout": 0.3},
    ],
    ids=["full", "dropout"],
)
def test_a_resumed_run_ends_with_the_parameters_of_an_uninterrupted_one(tiny_root, tmp_path, student):
    schedule = {"kd_loss": "skew", "kd_beta_end": 1.0, "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    schedule.update(student)
    train(base_config(tiny_root, output_dir=str(tmp_path / "complete"), **schedule))
    train(
        base_config(
            tiny_root,
            output_dir=str(tmp_path / "resumed"),
            resume_from_checkpoint=str(tmp_path / "complete" / "checkpoint-2"),
            **schedule,
        )
    )
    assert logged(tmp_path / "complete", "kd/beta") == pytest.approx([0.5, 0.625, 0.75, 0.875, 1.0])
    for key in ("kd/beta", "kd/gamma", "kd/hard_scale"):
        assert logged(tmp_path / "resumed", key) == logged(tmp_path / "complete", key)
    assert_same_weights(tmp_path / "resumed", tmp_path / "complete", tolerance=1e-7)
    resumed, complete = (tmp_path / name / TOKEN_TABLE for name in ("resumed", "complete"))
    assert resumed.read_text() == complete.read_text()


def test_packing_with_separate_attention_gives_the_loss_of_unpacked_records(tiny_root, tmp_path):
    together = {"max_samples": 4, "max_steps": 1, "per_device_train_batch_size": 4, "disable_shuffling": True}
    train(base_config(tiny_root, output_dir=str(tmp_path / "plain"), **together))
    packed = {"neat_packing": True, "cutoff_len": 1200, "per_device_train_batch_size": 1}
    train(base_config(tiny_root, output_dir=str(tmp_path / "packed"), **{**together, **packed}))
    for key in ("loss", "kd/difficulty", "kd/teacher_ce"):
        assert logged(tmp_path / "packed", key) == pytest.approx(logged(tmp_path / "plain", key), abs=2e-4)
    assert_same_weights(tmp_path / "packed", tmp_path / "plain", tolerance=1e-4)


@pytest.mark.parametrize(
    "student",
    [
        {"finetuning_type": "lora", "lora_target": "all"},
        {"finetuning_type": "lora", "lora_target": "all", "additional_target": "lm_head"},
        {"finetuning_type": "oft", "oft_target": "q_proj", "oft_block_size": 8},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        {"disable_gradient_checkpointing": True},
        {"bf16": True, "use_cpu": True},
    ],
    ids=["lora", "lora with head", "oft", "freeze", "no gradient checkpointing", "bf16"],
)
def test_every_kind_of_student_trains_towards_the_teacher(tiny_root, tmp_path, student):
    learning = {"kd_loss": "forward_kl", "kd_lambda": 0.9, "max_steps": 6, "learning_rate": 5e-3}
    train(base_config(tiny_root, output_dir=str(tmp_path / "out"), **{**learning, **student}))
    losses = logged(tmp_path / "out", "loss")
    assert losses[-1] < losses[0]
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    if student.get("finetuning_type") in ("lora", "oft"):
        assert "adapter_model.safetensors" in saved
        assert "model.safetensors" not in saved


def test_evaluation_reports_the_objective_and_picks_the_best_checkpoint(tiny_root, tmp_path):
    config = base_config(
        tiny_root,
        output_dir=str(tmp_path / "out"),
        eval_dataset="tiny_valid",
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=3,  # 8 records: the last batch is smaller
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        early_stopping_steps=2,
        learning_rate=1e-2,
        kd_loss="no_evolution",
        max_steps=4,
    )
    train(config)
    evaluated = logged(tmp_path / "out", "eval_loss")
    assert logged(tmp_path / "out", "eval_kd/difficulty") == pytest.approx(evaluated, rel=1e-5)  # (8) is d itself
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_metric"] == min(evaluated)

    alone = {**config, "do_train": False, "do_eval": True, "model_name_or_path": state["best_model_checkpoint"]}
    for key in ("eval_strategy", "save_strategy", "load_best_model_at_end", "early_stopping_steps"):
        alone.pop(key)
    train({**alone, "output_dir": str(tmp_path / "alone"), "per_device_eval_batch_size": 8})
    results = json.loads((tmp_path / "alone" / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(min(evaluated), rel=1e-5)  # whatever the batches


def test_prediction_with_generation_is_the_hosts(tiny_root, tmp_path):
    config = base_config(
        tiny_root,
        output_dir=str(tmp_path / "out"),
        do_train=False,
        do_predict=True,
        predict_with_generate=True,
        eval_dataset="tiny_valid",
        max_new_tokens=4,
        teacher_model="not/needed/here",
    )
    train(config)
    lines = (tmp_path / "out" / "generated_predictions.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["label"].endswith(".")
    assert len(lines) == 8


def test_accuracy_of_the_host_is_computed_in_addition_to_the_objective(tiny_root, tmp_path):
    evaluation = {"eval_dataset": "tiny_valid", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    for accuracy in (True, False):
        train(
            base_config(tiny_root, output_dir=str(tmp_path / str(accuracy)), compute_accuracy=accuracy, **evaluation)
        )
    assert 0 <= logged(tmp_path / "True", "eval_accuracy")[0] <= 1
    assert logged(tmp_path / "True", "eval_loss") == pytest.approx(logged(tmp_path / "False", "eval_loss"), rel=1e-5)


def test_records_without_a_response_and_batches_without_response_tokens_do_no_harm(tiny_root, tmp_path):
    # The prompt alone is longer than this cutoff for some records, so that nothing of their response is left.
    data = tmp_path / "data"
    data.mkdir()
    long = "far " * 200
    records = [
        {
            "instruction": "Translate the following sentences from English to German.\n\n### Input:",
            "input": text,
            "output": "Haus.",
        }
        for text in ("house", long, "dog", long)
    ]
    (data / "cut.json").write_text(json.dumps(records))
    (data / "dataset_info.json").write_text(json.dumps({"cut": {"file_name": "cut.json"}}))
    config = base_config(
        tiny_root,
        output_dir=str(tmp_path / "out"),
        dataset="cut",
        dataset_dir=str(data),
        per_device_train_batch_size=1,
        disable_shuffling=True,
        max_steps=4,
    )
    train(config)
    assert all(loss == loss for loss in logged(tmp_path / "out", "loss"))
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "out").values())


def test_an_empty_data_set_is_named(tiny_root, tmp_path):
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"none": {"file_name": "none.json"}}))
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), dataset="none", dataset_dir=str(tmp_path))
    with pytest.raises(DataError, match="data sets none holds no record"):
        train(config)


def test_a_column_that_the_records_lack_is_named(tiny_root, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps([{"instruction": "Translate.", "input": "a", "target": "b"}]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"other": {"file_name": "other.json"}}))
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), dataset="other", dataset_dir=str(tmp_path))
    with pytest.raises(DataError, match="data sets other has no column 'output': name the columns"):
        train(config)


OTHER_STAGES = """
import json, sys
from llamafactory.train.tuner import run_exp
for config in json.load(open(sys.argv.pop(1))):
    run_exp(config)
"""


@pytest.mark.slow
def test_other_stages_are_identical_with_and_without_the_plugin(tiny_root, tmp_path):
    pairs = [
        {"instruction": "Say.", "input": "x", "chosen": "good answer", "rejected": "bad answer"},
        {"instruction": "Say.", "input": "y", "chosen": "right", "rejected": "wrong"},
    ]
    info = {
        "pairs": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
        },
        "tiny": {"file_name": str(tiny_root / "data" / "tiny.json")},
    }
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    for switch in ("0", "1"):
        stages = [("sft", "tiny"), ("pt", "tiny"), ("dpo", "pairs")]
        configs = [
            base_config(
                tiny_root,
                output_dir=str(tmp_path / switch / stage),
                stage=stage,
                dataset=dataset,
                dataset_dir=str(tmp_path),
                teacher_model=None,
                template="alpaca",
                per_device_train_batch_size=2,
                max_steps=2,
            )
            for stage, dataset in stages
        ]
        (tmp_path / "configs.json").write_text(json.dumps(configs))
        result = command(
            [sys.executable, "-c", OTHER_STAGES, str(tmp_path / "configs.json")], env={"LLAMAFACTORY_SEKD": switch}
        )
        assert result.returncode == 0, result.stderr[-2000:]

    for stage in ("sft", "pt", "dpo"):
        without, with_plugin = tmp_path / "0" / stage, tmp_path / "1" / stage
        assert (without / "model.safetensors").read_bytes() == (with_plugin / "model.safetensors").read_bytes()
        assert sorted(path.name for path in without.iterdir()) == sorted(path.name for path in with_plugin.iterdir())
        assert logged(without, "loss") == logged(with_plugin, "loss")
