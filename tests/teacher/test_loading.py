"""How the teacher's keys reach the host's loader."""

from __future__ import annotations

import logging
import shutil
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import pytest
import torch  # noqa: F401  (registers the plug-in, as in every process of the host)
from helpers.runs import base_config, logged, train
from llamafactory.data.template import TEMPLATES
from llamafactory.hparams import DataArguments, FinetuningArguments, ModelArguments
from transformers import AutoTokenizer

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.teacher.compatibility import check_tokenizers


def test_the_teachers_path_adapters_and_bits_take_the_place_of_the_students():
    from llamafactory_sekd.host.teacher_loading import teacher_model_arguments

    student = ModelArguments(model_name_or_path="student", adapter_name_or_path="a", trust_remote_code=True)
    keys = FinetuningArguments(
        stage="sekd", teacher_model="teacher", teacher_model_adapters="x,y", teacher_model_quantization_bit=4
    )
    teacher = teacher_model_arguments(student, keys)
    assert (teacher.model_name_or_path, teacher.adapter_name_or_path, teacher.quantization_bit) == (
        "teacher",
        ["x", "y"],
        4,
    )
    assert (student.model_name_or_path, student.adapter_name_or_path, student.quantization_bit) == (
        "student",
        ["a"],
        None,
    )


def test_only_arguments_on_the_list_come_from_the_student():
    """What is the student's alone (new tokens, another context length) would make an untrained teacher."""
    from llamafactory_sekd.host.teacher_loading import SHARED_ARGUMENTS, teacher_model_arguments

    student = ModelArguments(
        model_name_or_path="student",
        add_tokens="<2de>",
        add_special_tokens="<a>,<b>",
        resize_vocab=True,
        rope_scaling="linear",
        shift_attn=True,
        model_revision="mine",
        moe_aux_loss_coef=0.5,
        flash_attn="sdpa",
        trust_remote_code=True,
    )
    keys = FinetuningArguments(stage="sekd", teacher_model="teacher")
    teacher = teacher_model_arguments(student, keys)
    plain = ModelArguments(model_name_or_path="teacher")
    for item in fields(ModelArguments):
        expected = student if item.name in SHARED_ARGUMENTS else plain
        assert getattr(teacher, item.name) == getattr(expected, item.name), item.name
    assert (student.add_tokens, student.resize_vocab) == (["<2de>"], True)


def test_a_home_directory_is_expanded():
    from llamafactory_sekd.host.teacher_loading import teacher_model_arguments

    keys = FinetuningArguments(stage="sekd", teacher_model="~/teacher")
    found = teacher_model_arguments(ModelArguments(model_name_or_path="student"), keys).model_name_or_path
    assert found == str(Path.home() / "teacher")


def test_a_token_that_the_teacher_has_not_learned_is_refused(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path), add_tokens="<2de>", resize_vocab=True)
    with pytest.raises(TeacherError, match=r"the student's token '<2de>' has the id .* the teacher does not know it"):
        train(config)


def chat_root(tiny_root: Path, out: Path, saved_with: str, chat: str) -> Path:
    """Copies of the tiny models whose tokenizer knows a chat template's end token, one saved as the host saves it."""
    for name in ("teacher", "student"):
        shutil.copytree(tiny_root / name, out / name)
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        tokenizer.add_tokens([chat], special_tokens=True)
        if name == saved_with:
            tokenizer.eos_token = chat
        tokenizer.save_pretrained(out / name)
    shutil.copytree(tiny_root / "data", out / "data")
    return out


@pytest.mark.parametrize("saved_with", ["teacher", "student"])
def test_with_every_template_the_end_tokens_are_compared_after_it_has_acted(tiny_root, saved_with):
    from llamafactory_sekd.host.teacher_loading import _apply_template

    plain = {name: AutoTokenizer.from_pretrained(tiny_root / name) for name in ("student", "teacher")}
    for name, template in TEMPLATES.items():
        chat = template.stop_words[0] if template.stop_words else "<|im_end|>"
        tokenizers = deepcopy(plain)
        for tokenizer in tokenizers.values():
            tokenizer.add_tokens([chat], special_tokens=True)
        tokenizers[saved_with].eos_token = chat
        _apply_template(tokenizers["student"], tokenizers["teacher"], DataArguments(template=name))
        check_tokenizers(tokenizers["student"], tokenizers["teacher"])
        ends = {tokenizer.eos_token for tokenizer in tokenizers.values()}
        assert ends == {chat if template.replace_eos or saved_with == "student" else "</s>"}, name


@pytest.mark.parametrize("saved_with", ["teacher", "student"])
def test_a_chat_teacher_and_a_base_student_train_and_the_end_token_is_told(tiny_root, tmp_path, saved_with, caplog):
    root = chat_root(tiny_root, tmp_path, saved_with, "<|im_end|>")
    with caplog.at_level("WARNING"):
        logging.getLogger("transformers").propagate = True
        train(base_config(root, output_dir=str(tmp_path / "out"), template="qwen", max_steps=1))
    assert "Student and teacher both use the end token '<|im_end|>'" in caplog.text


@pytest.mark.parametrize(("bits", "distance"), [(8, 0.01), (4, 0.1)])
def test_a_quantized_teacher_trains_and_serves_on_this_machine_and_stays_near_the_one_that_is_not(
    tiny_root, tmp_path, bits, distance
):
    pytest.importorskip("bitsandbytes", reason="the host needs bitsandbytes for it, which is not installed")
    from llamafactory_sekd.host.serve import make_service

    answers = []
    for name, given in (("none", None), ("bits", bits)):
        out = str(tmp_path / name)
        train(base_config(tiny_root, output_dir=out, max_steps=1, teacher_model_quantization_bit=given))
        answers.append(logged(tmp_path / name, "kd/teacher_ce")[0])
    assert answers[0] != answers[1]
    assert answers[1] == pytest.approx(answers[0], rel=distance)
    limits = {"batch_tokens": 64, "max_bytes": 2**20, "token": None, "adapters": None, "dtype": None, "overrides": []}
    _, line = make_service(str(tiny_root / "teacher"), quantization_bit=bits, **limits)
    assert "hidden states and top-k" in line  # bitsandbytes leaves the head as it is
