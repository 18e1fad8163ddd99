"""Batching changes the speed of decoding and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.sentences import ENGLISH
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.data.prompts import prompt
from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.decoding import agrees_with_plain_forward, hf_translate, plan_batches
from llamafactory_sekd.evaluation.evaluation_settings import Decoding
from llamafactory_sekd.evaluation.greedy import can_share_cache
from llamafactory_sekd.evaluation.systems import BatchLimits, Translation


LIMIT = 30
EOS, PAD = 1, 2


@pytest.fixture(scope="module")
def tokenizer(models: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(models["one"])


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    direction = parse_direction("en-de")
    texts = [prompt(sentence, direction) for sentence in ENGLISH]
    return [[0, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]


@pytest.fixture
def model(models: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(models["one"], dtype=torch.float32).eval()


def translate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], limits: BatchLimits, **keys: Any
) -> list[Translation]:
    def decode(rows: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    decoding = Decoding(max_new_tokens=LIMIT, **keys)
    groups = list(hf_translate(model, decode, [EOS], PAD, decoding)(prompts, limits))
    found = {index: translation for group in groups for index, translation in group}
    assert sum(map(len, groups)) == len(found) == len(prompts)
    return [found[index] for index in range(len(prompts))]


def alone(model: Any, tokenizer: Any, prompts: Sequence[list[int]], **keys: Any) -> list[Translation]:
    """Decode one sentence at a time with transformers and nothing else."""
    result = []
    for ids in prompts:
        output = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=LIMIT, eos_token_id=EOS, pad_token_id=PAD, **keys
        )
        row = output[0, len(ids) :].tolist()
        ended = EOS in row
        row = row[: row.index(EOS)] if ended else row
        text = tokenizer.decode(row, skip_special_tokens=True).strip()
        result.append(Translation(text, len(row), hit_limit=not ended))
    return result


def test_the_sentences_end_at_different_steps(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    """Else the tests below would show little."""
    expected = alone(model, tokenizer, prompts)
    assert len({translation.tokens for translation in expected}) > 4
    assert any(translation.hit_limit for translation in expected)
    assert len({translation.text for translation in expected}) == len(expected)


@pytest.mark.parametrize("limits", [BatchLimits(1), BatchLimits(600), BatchLimits(1 << 20, 3), BatchLimits(1 << 20)])
def test_greedy_output_is_that_of_one_sentence_at_a_time(
    model: Any, tokenizer: Any, prompts: list[list[int]], limits: BatchLimits
) -> None:
    expected = alone(model, tokenizer, prompts)
    assert can_share_cache(model)
    assert translate(model, tokenizer, prompts, limits) == expected


def test_eager_attention_decodes_alike(models: dict[str, Path], tokenizer: Any, prompts: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        models["one"], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert translate(model, tokenizer, prompts, BatchLimits(1 << 20, 3)) == alone(model, tokenizer, prompts)


def test_an_adapter_that_is_not_merged_decodes_alike(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    from peft import LoraConfig, get_peft_model

    plain = alone(model, tokenizer, prompts)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["gate_proj"], init_lora_weights=False)).eval()
    expected = alone(adapted, tokenizer, prompts)
    assert expected != plain
    assert can_share_cache(adapted)
    assert translate(adapted, tokenizer, prompts, BatchLimits(1 << 20, 4)) == expected


def test_prompts_that_share_nothing_or_everything_decode_alike(model: Any, tokenizer: Any) -> None:
    prompts = [[5, 6, 7], [9], [9], [8, 8, 8, 8, 8, 8]]
    assert translate(model, tokenizer, prompts, BatchLimits(1 << 20)) == alone(model, tokenizer, prompts)
    same = [prompts[0]] * 3
    assert translate(model, tokenizer, same, BatchLimits(1 << 20, 2)) == alone(model, tokenizer, same)


@pytest.mark.parametrize(
    "keys", [{"num_beams": 3}, {"num_beams": 2, "length_penalty": 2.0}, {"repetition_penalty": 1.3}]
)
def test_other_searches_are_those_of_transformers(
    model: Any, tokenizer: Any, prompts: list[list[int]], keys: dict[str, Any]
) -> None:
    expected = alone(model, tokenizer, prompts, **keys)
    assert expected != alone(model, tokenizer, prompts)
    assert translate(model, tokenizer, prompts, BatchLimits(1 << 20, 4), **keys) == expected


def test_a_sliding_window_is_left_to_transformers(tokenizer: Any, prompts: list[list[int]]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, sliding_window=16, initializer_range=0.3, **sizes
    )
    model = MistralForCausalLM(config).eval()
    assert not can_share_cache(model)
    found = translate(model, tokenizer, prompts[:3], BatchLimits(1))
    assert found == alone(model, tokenizer, prompts[:3])


def test_the_sampling_defaults_of_a_checkpoint_do_not_apply(
    model: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    expected = alone(model, tokenizer, prompts)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=0, max_length=70)
    assert translate(model, tokenizer, prompts, BatchLimits(1 << 20)) == expected


def test_a_rank_without_a_share_translates_nothing(model: Any, tokenizer: Any) -> None:
    assert translate(model, tokenizer, [], BatchLimits(1 << 20)) == []


def test_decoding_leaves_the_callers_gradient_mode_alone(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    def decode(rows: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(rows)

    groups = hf_translate(model, decode, [EOS], PAD, Decoding(max_new_tokens=4))(prompts, BatchLimits(200))
    next(groups)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    tokens=st.integers(1, 5000),
    sentences=st.none() | st.integers(1, 8),
    beams=st.integers(1, 4),
)
def test_batches_hold_every_sentence_once_within_the_limits(
    lengths: list[int], tokens: int, sentences: int | None, beams: int
) -> None:
    batches = list(plan_batches(lengths, new_tokens=50, beams=beams, limits=BatchLimits(tokens, sentences)))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * beams * (longest + 50) <= tokens
        assert sentences is None or len(batch) <= sentences
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts == sorted(firsts, reverse=True)


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


WIDE = {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2}
SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 4}
MIXTURE = {"num_local_experts": 2, "num_experts_per_tok": 1}
LONG_ROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0, 4.0, 2.0, 1.0]}

# Architectures that count positions, look back, or remember the past in a way of their own: class and configuration.
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon_alibi": ("Falcon", {"alibi": True, **SHAPE}),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "rwkv": ("Rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
    "recurrent_gemma": (
        "RecurrentGemma",
        {**WIDE, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 32},
    ),
    "lfm2": ("Lfm2", {**WIDE, "layer_types": ["conv", "full_attention"]}),
    "minimax": (
        "MiniMax",
        {**WIDE, **MIXTURE, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    ),
    "jamba": (
        "Jamba",
        {**WIDE, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    # Local attention over a window that the configuration does not give to the cache.
    "gpt_neo": (
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 16,
        },
    ),
    "gemma2": ("Gemma2", {**WIDE, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    # Rotations that change when the longest sentence of a batch passes a length.
    "long_rope": (
        "Phi3",
        {
            **WIDE,
            "pad_token_id": PAD,
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 512,
            "rope_scaling": LONG_ROPE,
        },
    ),
}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", WIDE),
    "gpt2": ("GPT2LMHead", SMALL),
    "codegen": ("CodeGen", {**SMALL, "rotary_dim": 8}),
    "opt": ("OPT", {**SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512}),
    "gpt_neox": ("GPTNeoX", {**SHAPE, "intermediate_size": 64}),
    "stable_lm": ("StableLm", WIDE),
    "granite_moe": ("GraniteMoe", {**WIDE, **MIXTURE}),
}


def build(name: str, size: int, **keys: Any) -> Any:
    """A random model of an architecture."""
    family, settings = (ODD | PLAIN)[name]
    config = getattr(transformers, f"{family.removesuffix('LMHead')}Config")(vocab_size=size, **{**settings, **keys})
    model_class = getattr(transformers, f"{family}Model" if family.endswith("LMHead") else f"{family}ForCausalLM")
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():  # far enough from uniform that no two tokens tie
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", [*ODD, *PLAIN])
def test_every_architecture_translates_as_each_prompt_alone(
    tokenizer: Any, prompts: list[list[int]], name: str
) -> None:
    model = build(name, len(tokenizer))
    few = sorted(prompts, key=len)[:: max(1, len(prompts) // 6)]
    expected = alone(model, tokenizer, few)
    assert len({translation.text for translation in expected}) > 1
    assert translate(model, tokenizer, few, BatchLimits(1 << 20, 4)) == expected


@pytest.mark.parametrize("name", ["gpt2", "opt", "codegen", "mpt"])
def test_a_prompt_beyond_the_last_position_is_one_line_with_the_remedy(
    tokenizer: Any, prompts: list[list[int]], name: str
) -> None:
    key = {"gpt2": "n_positions", "codegen": "n_positions", "mpt": "max_seq_len"}.get(name, "max_position_embeddings")
    model = build(name, len(tokenizer), **{key: 24})
    with pytest.raises(EvaluationError, match=r"reads up to 24 tokens.*lower `max_new_tokens`"):
        translate(model, tokenizer, prompts, BatchLimits(1 << 20, 4))


def test_the_probe_lets_plain_models_pass_and_stops_those_with_positions_of_their_own(
    model: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    assert agrees_with_plain_forward(model, prompts, PAD, LIMIT)
    assert agrees_with_plain_forward(model.to(torch.bfloat16), prompts, PAD, LIMIT)
    assert agrees_with_plain_forward(build("llama", len(tokenizer)), prompts, PAD, LIMIT)
    for name in ("mpt", "bloom", "falcon_alibi"):
        assert not agrees_with_plain_forward(build(name, len(tokenizer)), prompts, PAD, LIMIT), name
        assert not agrees_with_plain_forward(build(name, len(tokenizer)).to(torch.bfloat16), prompts, PAD, LIMIT), name
