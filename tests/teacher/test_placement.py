"""Wherever the teacher is placed, its answers are the same; no test here has a second device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import tiny
from helpers.runs import base_config, logged, train, weights
from transformers import AutoModelForCausalLM

from llamafactory_sekd.objectives import IDENTITY
from llamafactory_sekd.teacher import Placement, Teacher, engine_config


INPUTS = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
ROWS = torch.tensor([[True, False, True, False, True, False]] * 2)


@pytest.fixture(scope="module")
def as_the_student(tiny_root, tmp_path_factory) -> Path:
    return train(base_config(tiny_root, output_dir=str(tmp_path_factory.mktemp("auto") / "out")))


@pytest.mark.parametrize(
    "keys", [{"teacher_model_device": "cpu"}, {"teacher_offload": True}], ids=["device", "offload"]
)
def test_a_run_is_the_same_wherever_its_teacher_is_placed(tiny_root, tmp_path, as_the_student, keys):
    out = train(base_config(tiny_root, output_dir=str(tmp_path / "out"), **keys))
    assert logged(out, "kd/difficulty") == logged(as_the_student, "kd/difficulty")
    for name, value in weights(as_the_student).items():
        assert torch.equal(weights(out)[name], value)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_rest_in_main_memory_are_fetched_for_a_forward_pass_and_leave_again(tmp_path, tied):
    folder = tiny.save_llama(tmp_path / "teacher", seed=3, tie_word_embeddings=tied)
    expected = Teacher(AutoModelForCausalLM.from_pretrained(folder), Accelerator(cpu=True)).logits(INPUTS, ROWS)

    model = AutoModelForCausalLM.from_pretrained(folder)
    teacher = Teacher(model, Accelerator(cpu=True), Placement(offload=True))
    seen: list[str] = []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight.device.type))

    def resting() -> set[str]:
        return {parameter.device.type for parameter in model.model.parameters()}

    for _ in range(2):
        assert resting() == {"meta"}
        assert torch.equal(teacher.logits(INPUTS, ROWS), expected)
    assert teacher.logit_transform(INPUTS) == IDENTITY
    with teacher.answers(INPUTS, ROWS)(None) as source:
        logits = source.logits(slice(None), torch.empty(len(source), source.vocab_size))
    torch.testing.assert_close(logits, expected)
    assert set(seen) <= {"cpu", "meta"}
    assert resting() == {"meta"}
    assert model.get_output_embeddings().weight.device.type == "cpu"  # the head is read outside of forward passes


STUDENTS = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW"},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}


def test_the_teachers_engine_takes_from_the_students_what_an_engine_without_optimizer_needs():
    derived = engine_config(STUDENTS, None, offload=False)
    assert derived["zero_optimization"] == {"stage": 0}
    assert not {"optimizer", "gradient_clipping"} & set(derived)
    assert (derived["train_batch_size"], derived["bf16"]) == (16, {"enabled": True})
    assert STUDENTS["zero_optimization"]["stage"] == 2  # untouched

    sharded = {**STUDENTS, "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    assert engine_config(sharded, None, offload=False)["zero_optimization"] == sharded["zero_optimization"]
    assert engine_config(sharded, None, offload=True)["zero_optimization"]["offload_param"]["device"] == "cpu"


def test_the_teachers_own_engine_keeps_the_runs_batches_and_the_types_that_it_leaves_open():
    own = {"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3}}
    config = engine_config(STUDENTS, own, offload=False)
    assert (config["train_batch_size"], config["bf16"]["enabled"]) == (16, True)
    assert config["zero_optimization"] == {"stage": 3}
    assert engine_config(STUDENTS, {**own, "bf16": {"enabled": False}}, offload=False)["bf16"] == {"enabled": False}
