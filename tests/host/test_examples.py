"""Every training YAML in `examples/` parses with the real argument classes, and no key of it is unknown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from helpers.runs import base_config, logged, train, weights


YAMLS = Path(__file__).parents[2] / "examples" / "yamls"
EVERY = sorted(YAMLS.parent.rglob("*.yaml"))
TRAINING = sorted(path for path in YAMLS.glob("*.yaml") if "stage" in yaml.safe_load(path.read_text(encoding="utf-8")))
OBJECTIVES = [
    "self_evolution",
    "self_evolution_topk",
    "no_evolution",
    "skew",
    "skew_teacher",
    "forward_kl",
    "reverse_kl",
]


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_a_training_example_parses_with_the_hosts_classes(path, monkeypatch):
    from llamafactory.hparams import parser

    from llamafactory_sekd.arguments import STAGE

    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    # What the example asks of the machine, not of its reader: a GPU, several ranks.
    config.pop("deepspeed", None)
    config.pop("teacher_model_quantization_bit", None)
    if config.pop("bf16", False):
        assert not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
    monkeypatch.chdir(YAMLS.parents[1])
    model_args, data_args, _, finetuning_args, _ = parser._parse_train_args(config)
    assert model_args.model_name_or_path
    assert data_args.template == ("qwen" if path.stem.endswith("_chat") else "parrot")
    assert finetuning_args.use_sekd == (config["stage"] == STAGE)


def test_there_is_an_example_for_every_objective_and_the_papers_settings_are_the_papers():
    configs = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in TRAINING}
    assert {config.get("kd_loss") for config in configs.values()} >= set(OBJECTIVES)
    paper = configs["sekd_llama7b.yaml"]
    assert (paper["kd_lambda"], paper["kd_beta"], paper["kd_gamma"]) == (0.5, 0.5, 0.4)
    assert (paper["learning_rate"], paper["warmup_ratio"], paper["num_train_epochs"], paper["cutoff_len"]) == (
        2e-5,
        0.03,
        3,
        512,
    )
    assert paper["per_device_train_batch_size"] * paper["gradient_accumulation_steps"] * 8 == 128


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_the_files_that_an_example_names_are_shipped_or_made_by_a_command(path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "deepspeed" in config:
        assert (YAMLS.parents[1] / config["deepspeed"]).is_file()


def test_no_example_overwrites_its_output_so_the_same_command_continues():
    configs = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in EVERY}
    assert len(configs) >= 50
    assert [name for name, config in configs.items() if config.get("overwrite_output_dir")] == []
    assert [path.name for path in TRAINING if configs[path.name].get("overwrite_output_dir") is not False] == []


CHOOSING = ("load_best_model_at_end", "metric_for_best_model", "save_total_limit", "save_strategy", "eval_strategy")
PAPERS_SFT = ("sft_student_llama7b", "sft_teacher_llama13b", "sft_teacher_llama30b")


def papers_sft(name):
    config = yaml.safe_load((YAMLS / f"{name}.yaml").read_text(encoding="utf-8"))
    return {key: config[key] for key in (*CHOOSING, "stage", "overwrite_output_dir", "eval_dataset")}


def test_the_papers_sft_files_choose_their_checkpoint_alike_on_wmt21():
    first, *others = map(papers_sft, PAPERS_SFT)
    assert all(other == first for other in others)
    assert first["eval_dataset"] == "wmt21_valid"


def test_the_papers_sft_saves_its_best_checkpoint_and_the_same_command_again_changes_nothing(tiny_root, tmp_path):
    config = base_config(
        tiny_root,
        **{**papers_sft(PAPERS_SFT[0]), "eval_dataset": "tiny_valid"},
        **{"teacher_model": None, "output_dir": str(tmp_path / "out")},
        **{"max_steps": None, "num_train_epochs": 3, "learning_rate": 0.5},  # diverges
    )
    losses = logged(train(config), "eval_loss")
    assert min(losses) < losses[-1]
    best, _ = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    saved, chosen = weights(tmp_path / "out"), weights(best)
    assert all(torch.equal(saved[name], chosen[name]) for name in chosen)

    train(config)
    again = weights(tmp_path / "out")
    assert all(torch.equal(saved[name], again[name]) for name in saved)
