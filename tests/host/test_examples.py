"""Every training YAML in `examples/` parses with the real argument classes, and no key of it is unknown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml


YAMLS = Path(__file__).parents[2] / "examples" / "yamls"
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
    assert data_args.template == "parrot"
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
