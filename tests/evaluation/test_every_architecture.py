"""Every causal language model of transformers translates many sentences together as it translates each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.architectures import BUILT, EOS, NAMES, NOT_BUILT, PAD, VOCABULARY, build
from transformers import GenerationConfig

from llamafactory_sekd.evaluation.decoding import SeededPrompt, _Search
from llamafactory_sekd.evaluation.evaluation_settings import Decoding
from llamafactory_sekd.evaluation.systems import BatchLimits


NEW, LONGEST = 5, 40
LISTED = {
    "fast": """
        apertus arcee aria_text biogpt bitnet code_llama codegen cohere dbrx deepseek_v2 deepseek_v3 diffllama dots1
        ernie4_5 ernie4_5_moe falcon flex_olmo gemma glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox
        gpt_neox_japanese gptj granite granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe jetmoe
        llama longcat_flash mistral mixtral nemotron olmo olmo2 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe
        qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2
    """,
    "in batches": """
        bamba bert bert-generation big_bird bloom cohere2 electra ernie exaone4 falcon_h1 falcon_mamba fuyu gemma2
        gemma3_text gemma3n_text gpt_neo gpt_oss granitemoehybrid jamba llama4_text mamba mamba2 megatron-bert
        ministral modernbert-decoder moshi mpt olmo3 qwen3_next rembert vaultgemma xglm xlm-roberta-xl zamba
    """,
    "one by one": """
        bart bigbird_pegasus blenderbot blenderbot-small camembert ctrl data2vec-text doge lfm2 marian mbart minimax
        mvp openai-gpt pegasus plbart recurrent_gemma roberta roberta-prelayernorm roc_bert roformer rwkv trocr
        whisper xlm xlm-roberta xlnet xmod zamba2
    """,
}
WAYS = {name: way for way, names in LISTED.items() for name in names.split()}


def prompts() -> list[list[int]]:
    """Prompts that begin alike, of very different lengths."""
    draw = torch.Generator().manual_seed(1)
    lengths = (LONGEST - 4, 1, 15)
    return [[0, 5, 6, 7, *torch.randint(8, VOCABULARY, (n,), generator=draw).tolist()] for n in lengths]


def alone(model: Any, prompt: list[int]) -> list[int]:
    """Generate from one prompt, with transformers and nothing else."""
    row = model.generate(torch.tensor([prompt]))[0, len(prompt) :].tolist()
    return row[: row.index(EOS)] if EOS in row else row


def test_every_architecture_is_listed_once() -> None:
    assert sorted([*WAYS, *NOT_BUILT]) == sorted(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_it_translates_as_one_sentence_at_a_time_in_the_way_of_the_list(name: str) -> None:
    model = build(name)
    # In place of the model's own, which fills what a call leaves open: BART, for one, forces its last token.
    model.generation_config = GenerationConfig(max_new_tokens=NEW, eos_token_id=EOS, pad_token_id=PAD)
    expected = [alone(model, prompt) for prompt in prompts()]
    search = _Search(model, [EOS], PAD, Decoding(max_new_tokens=NEW), None, 1)
    groups = search.translations(
        [SeededPrompt(prompt) for prompt in prompts()],
        BatchLimits(1 << 20, 2),
        lambda rows: [" ".join(map(str, row)) for row in rows],
    )
    found = {index: ours[0].text for group in groups for index, ours in group}
    assert found == {index: " ".join(map(str, row)) for index, row in enumerate(expected)}
    way = "fast" if search._way.fast else "in batches" if search._way.padded else "one by one"
    assert way == WAYS[name]
