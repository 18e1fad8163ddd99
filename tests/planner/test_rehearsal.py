"""What is counted in a rehearsal is what tensors take, and no weight is needed for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.planner.contentless import LiveMemory, build_without_content, to_fake
from llamafactory_sekd.planner.planned_run import Blueprint, Run
from llamafactory_sekd.planner.rehearsal import rehearse
from llamafactory_sekd.presets import PRESETS


SIZES = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
LLAMA = LlamaConfig(**SIZES)


def blueprint(config=LLAMA, checkpointing=False, **kept):
    def build():
        model = AutoModelForCausalLM.from_config(config)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    return Blueprint(build, **kept)


def distillation(kd_loss="self_evolution", **keys):
    topk = {"kd_topk": 0.5} if kd_loss == "self_evolution_topk" else {}
    return DistillationArguments(teacher_model="x", kd_loss=kd_loss, **topk, **keys)


RUN = Run(blueprint(), blueprint(), distillation(), batch_size=2, length=64, accelerator=False)


def test_the_peak_is_that_of_the_tensors_alive_together():
    with FakeTensorMode(), LiveMemory() as live:
        first = torch.zeros(1000)
        with live.labeled("objective"):
            second = torch.zeros(500)
            view = second[:10]  # views take nothing
        del second
        third = first + 1  # the view keeps the second alive
        del view, first
        fourth = torch.zeros(250)
    assert live.peak == {"activations": 4 * (1000 + 1000), "objective": 4 * 500}
    assert third.shape != fourth.shape


def test_a_tensor_can_be_ignored_or_change_its_label():
    with FakeTensorMode():
        known = torch.zeros(1000)
        live = LiveMemory()
        live.ignore(known)
        with live:
            transposed = known.view(10, 100).t()
            gradient = torch.zeros(10)
            live.relabel(gradient, "gradients")
            last = torch.zeros(1)
    assert +live.peak == {"gradients": 40, "activations": 4}
    assert transposed.shape == (100, 10)
    assert last.numel() == 1


def test_tied_parameters_stay_tied_and_others_keep_type_and_state():
    config = LlamaConfig(**{**SIZES, "tie_word_embeddings": True})
    model = build_without_content(blueprint(config).build)
    model.model.norm.weight.requires_grad_(False)
    with FakeTensorMode():
        to_fake(model, torch.bfloat16)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert not model.model.norm.weight.requires_grad
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("kd_loss", PRESETS)
def test_every_objective_can_be_rehearsed_in_the_head_and_on_logits(kd_loss):
    fused = rehearse(replace(RUN, distillation=distillation(kd_loss)))
    assert fused.fused
    assert not fused.obstacle
    plain = rehearse(replace(RUN, student=Blueprint(with_an_adapted_head), distillation=distillation(kd_loss)))
    assert not plain.fused
    assert not plain.obstacle
    # Logits of student and teacher, and at least their two log-softmaxes.
    tokens = RUN.batch_size * RUN.length // 2
    assert sum(plain.peak.values()) > 4 * tokens * 500 * 4


def with_an_adapted_head():
    model = AutoModelForCausalLM.from_config(LLAMA)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))


def test_a_soft_cap_stays_in_the_head_and_needs_one_buffer_more():
    def peak(**capping):
        config = Gemma2Config(**SIZES, attn_implementation="eager", **capping)
        found = rehearse(replace(RUN, student=blueprint(config), teacher=blueprint(config)))
        assert found.fused
        assert not found.obstacle
        return found.peak["objective"]

    tokens = RUN.batch_size * RUN.length // 2
    assert peak(final_logit_softcapping=30.0) == peak(final_logit_softcapping=None) + tokens * 500 * 4


def test_gradients_of_a_complete_backward_pass_are_those_of_the_parameters():
    result = rehearse(replace(RUN, accumulation=2))
    model = AutoModelForCausalLM.from_config(LLAMA)
    assert result.peak["gradients"] == 4 * model.num_parameters()
    assert (result.student.parameters, result.student.bytes) == (model.num_parameters(), 4 * model.num_parameters())
    assert result.student.head == 500 * 64


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"student": blueprint(checkpointing=True)}, {}),
        ({}, {"batch_size": 4}),
        ({}, {"length": 128}),
        ({}, {"student": blueprint(LlamaConfig(**{**SIZES, "num_hidden_layers": 6}))}),
        ({}, {"student": blueprint(LlamaConfig(**SIZES, attn_implementation="eager"))}),
        ({"autocast": torch.bfloat16}, {}),
    ],
    ids=["gradient checkpointing", "batch", "length", "layers", "eager attention", "mixed precision"],
)
def test_activations_grow_and_shrink_as_in_training(less, more):
    run = replace(RUN, batch_size=2, length=256)
    low, high = (rehearse(replace(run, **{**changes})).peak["activations"] for changes in (less, more))
    if "batch_size" in more or "length" in more:
        low = rehearse(replace(RUN, batch_size=2, length=256 if "batch_size" in more else 64)).peak["activations"]
    assert low < 0.9 * high


def test_twice_the_chunk_takes_twice_the_chunks_logits_and_buffers():
    def peak(chunk):
        run = replace(RUN, batch_size=8, length=128, responses=1.0, distillation=distillation(kd_chunk_size=chunk))
        return rehearse(run).peak["objective"]

    # So small a vocabulary leaves room for the complete chunk in the six buffers, too.
    assert peak(512) - peak(256) == pytest.approx((2 + 6) * 256 * 500 * 4, rel=1e-2)


@pytest.mark.parametrize("accelerator", [True, False])
def test_an_accelerators_logits_do_not_depend_on_this_cpu(monkeypatch, accelerator):
    run = replace(RUN, engine_dtype=torch.bfloat16, batch_size=8, responses=1.0, accelerator=accelerator)
    peaks = []
    for has_instructions in (True, False):
        capabilities = {"avx512_bf16": has_instructions}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        peaks.append(rehearse(run).peak["objective"])
    assert peaks[0] == peaks[1] if accelerator else peaks[0] < peaks[1]


def test_supervised_fine_tuning_and_other_families_can_be_rehearsed():
    sft = rehearse(replace(RUN, teacher=None, distillation=None))
    assert sft.teacher is None
    assert not sft.obstacle
    assert sum(sft.peak.values()) >= 2 * RUN.batch_size * RUN.length * 500 * 4  # logits and log-softmax
    qwen = blueprint(Qwen2Config(**SIZES, tie_word_embeddings=True))
    assert not rehearse(replace(RUN, student=qwen, teacher=qwen)).obstacle


def hooked(hook):
    def build():
        model = AutoModelForCausalLM.from_config(LLAMA)
        model.model.norm.register_forward_hook(hook)
        return model

    return Blueprint(build)


def test_a_model_may_ask_for_the_content_of_its_tensors():
    def asks(module, arguments, output):
        assert not output.isnan().any()
        assert output.sum().item() == 0
        assert len(output[0, 0].nonzero()) == 64

    assert not rehearse(replace(RUN, student=hooked(asks))).obstacle


def test_a_model_that_cannot_be_rehearsed_is_reported_and_its_size_still_known():
    result = rehearse(replace(RUN, student=hooked(lambda module, arguments, output: output.unique())))
    assert "unique" in result.obstacle
    assert not result.peak
    assert result.student.parameters > 0


def test_quantised_linear_layers_take_their_bits_and_the_head_and_embedding_their_own():
    plain = rehearse(RUN).teacher
    four, eight = (rehearse(replace(RUN, teacher=blueprint(quantization_bit=bits))).teacher for bits in (4, 8))
    linear = 3 * (4 * 64 * 64 + 3 * 64 * 128)
    assert plain.bytes - eight.bytes == 3 * linear  # 4 bytes become 1
    assert four.bytes == pytest.approx(plain.bytes - linear * (4 - 0.5 - 1 / 64), rel=1e-3)
