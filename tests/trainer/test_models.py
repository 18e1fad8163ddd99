"""Every kind of model and head gets the same objective, by the fused path where it is exact and the plain one else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import naive_step, tiny
from helpers.runs import base_config, logged, train, weights
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from llamafactory_sekd.errors import TeacherError


COUNT = 4


def loss_of_one_step(root: Path, out: Path, **overrides) -> dict[str, float]:
    """Train one step on the first sentences and return what was logged."""
    step = {"max_samples": COUNT, "per_device_train_batch_size": COUNT, "max_steps": 1}
    train(base_config(root, output_dir=str(out), **{**step, **overrides}))
    return {key: logged(out, key)[0] for key in ("loss", "kd/difficulty", "kd/hard_ratio")}


def assert_is_the_papers(root: Path, found: dict[str, float]) -> None:
    assert found == pytest.approx(naive_step.self_evolution(root, COUNT), rel=5e-4)


def small(tokenizer_size: int) -> dict:
    return {
        "vocab_size": tokenizer_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


def save_model(directory: Path, model_class: type, config: object) -> Path:
    directory.mkdir(parents=True)
    tiny.save_tokenizer(directory)
    torch.manual_seed(3)
    model_class(config).save_pretrained(directory)
    return directory


def save_capped_or_scaled(directory: Path, family: str) -> None:
    if family == "gemma2":
        config = Gemma2Config(**small(384), head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8)
        save_model(directory, Gemma2ForCausalLM, config)
    else:
        save_model(directory, CohereForCausalLM, CohereConfig(**small(384), logit_scale=0.25))


@pytest.fixture
def root(tmp_path, tiny_root) -> Path:
    """A folder of links to the shared models, so that one of them can be exchanged."""
    for name in ("teacher", "student", "data"):
        (tmp_path / name).symlink_to(tiny_root / name)
    return tmp_path


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_soft_capped_and_scaled_logits_are_taken_as_the_model_makes_them(root, role, family, caplog):
    (root / role).unlink()
    save_capped_or_scaled(root / role, family)
    assert_is_the_papers(root, loss_of_one_step(root, root / "out"))
    assert "more than a product" not in caplog.text  # in chunks, not on the logits of all tokens


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_a_capped_or_scaled_student_learns_in_the_head_what_it_learns_on_logits(root, family, monkeypatch):
    (root / "student").unlink()
    save_capped_or_scaled(root / "student", family)
    keys = {"kd_gamma": 2.0, "packing": True, "cutoff_len": 600, "max_steps": 3, "max_grad_norm": 0.05}
    fused = train(base_config(root, output_dir=str(root / "fused"), **keys))
    monkeypatch.setattr("llamafactory_sekd.trainer.trainer.logit_transform", lambda *_: None)
    plain = train(base_config(root, output_dir=str(root / "plain"), **keys))
    assert logged(fused, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(fused)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_neither_tying_nor_the_chunk_size_nor_compiling_changes_the_loss(root, tied, chunk):
    (root / "student").unlink()
    tiny.save_llama(root / "student", seed=5, tie_word_embeddings=tied)
    assert_is_the_papers(root, loss_of_one_step(root, root / "out", kd_chunk_size=chunk, kd_compile=chunk == 3))


def test_a_padded_vocabulary_is_cut_to_the_used_ids_and_the_log_says_so(root, caplog):
    (root / "teacher").unlink()
    tiny.save_llama(root / "teacher", seed=1, vocab_size=448)
    found = loss_of_one_step(root, root / "out")
    assert "448" in caplog.text
    assert "renormalizes" in caplog.text

    # The same teacher with the padding taken out of its head.
    model = AutoModelForCausalLM.from_pretrained(root / "teacher")
    used = len(tiny.save_tokenizer(root / "tokenizer"))
    cut_teacher, cut_student = root / "cut" / "teacher", root / "cut" / "student"
    for directory, source in (
        (cut_teacher, model),
        (cut_student, AutoModelForCausalLM.from_pretrained(root / "student")),
    ):
        source.resize_token_embeddings(used)
        source.save_pretrained(directory)
        tiny.save_tokenizer(directory)
    assert_is_the_papers(root / "cut", found)


def test_the_teachers_adapters_count(root):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(root / "teacher"),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(root / "adapter")
    merged = root / "merged" / "teacher"
    model.merge_and_unload().save_pretrained(merged)
    tiny.save_tokenizer(merged)
    (root / "merged" / "student").symlink_to(root / "student")
    found = loss_of_one_step(root, root / "out", teacher_model_adapters=str(root / "adapter"))
    assert_is_the_papers(root / "merged", found)
    assert found["kd/difficulty"] != pytest.approx(naive_step.self_evolution(root, COUNT)["kd/difficulty"], abs=1e-3)


def test_the_teacher_is_frozen_and_absent_from_checkpoints(root, tmp_path):
    before = (root / "teacher" / "model.safetensors").read_bytes()
    out = tmp_path / "out"
    train(base_config(root, output_dir=str(out), save_strategy="steps", save_steps=1, max_steps=2))
    assert (root / "teacher" / "model.safetensors").read_bytes() == before
    student = AutoModelForCausalLM.from_pretrained(root / "student")
    saved = AutoModelForCausalLM.from_pretrained(out / "checkpoint-2")
    assert {name: value.shape for name, value in saved.named_parameters()} == {
        name: value.shape for name, value in student.named_parameters()
    }
    optimizer = torch.load(out / "checkpoint-2" / "optimizer.pt")
    assert len(optimizer["state"]) == len(list(student.parameters()))


def test_a_teacher_with_another_tokenizer_is_refused_before_the_student_is_loaded(root):
    (root / "teacher").unlink()
    tiny.save_llama(root / "teacher", seed=1, vocab_size=320)
    tiny.save_tokenizer(root / "teacher", vocab_size=320)
    with pytest.raises(TeacherError, match="teacher does not know it"):
        loss_of_one_step(root, root / "out")
