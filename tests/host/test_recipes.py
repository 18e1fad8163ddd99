"""Every training command of README and recipes names a file that is there and keys that the host accepts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from llamafactory_sekd.config import read_config
from llamafactory_sekd.evaluation.evaluation_settings import parse_settings


REPOSITORY = Path(__file__).parents[2]
TEXT = "".join((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "docs/recipes.md"))
TRAINING = re.compile(r"^[A-Z_0-9=. ]*(?:llamafactory-cli train|sekd cache) +(examples/[^#\n]*)", re.MULTILINE)
COMMANDS = sorted({command.strip() for command in TRAINING.findall(re.sub(r" *\\\n *", " ", TEXT))})


FILES = [text for text in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL) if "stage: sekd" in text]


def test_the_pages_hold_commands():
    assert len(COMMANDS) >= 10
    assert len(FILES) >= 2


@pytest.mark.parametrize("text", FILES, ids=lambda text: text.splitlines()[0])
def test_a_file_of_the_pages_parses_with_the_hosts_classes(text):
    import torch  # noqa: F401
    from llamafactory.hparams import parser

    model_args, *_, finetuning_args, _ = parser._parse_train_args(yaml.safe_load(text))
    assert model_args.model_name_or_path
    assert finetuning_args.teacher_model


def test_an_evaluation_of_the_pages_is_one_that_the_evaluation_takes():
    texts = [text for text in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL) if "systems:" in text]
    assert texts
    for text in texts:
        assert parse_settings(yaml.safe_load(text), "README").systems


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_pages_parses_with_the_hosts_classes(command, monkeypatch):
    import torch  # noqa: F401  # the plug-in comes with it, as under the command
    from llamafactory.hparams import parser

    monkeypatch.chdir(REPOSITORY)
    name, *rest = shlex.split(command)
    config = read_config(Path(name), [word for word in rest if "=" in word])
    for key in ("deepspeed", "bf16", "teacher_model_quantization_bit"):  # what they ask of the machine
        config.pop(key, None)
    model_args, *_ = parser._parse_train_args(config)
    assert model_args.model_name_or_path
