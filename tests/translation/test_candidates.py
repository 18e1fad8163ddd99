"""Samples follow the model and nothing else; a beam's best are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sentences import ENGLISH
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from llamafactory_sekd.data.checks import Problem
from llamafactory_sekd.evaluation.decoding import Drawing, SeededPrompt, hf_candidates
from llamafactory_sekd.evaluation.evaluation_settings import Decoding
from llamafactory_sekd.evaluation.scores import pairwise_chrf
from llamafactory_sekd.evaluation.systems import BatchLimits, Translation
from llamafactory_sekd.translation.choosing import FILTERS, find_problem


EOS, PAD = 1, 2


def tiny(kind: str) -> Any:
    torch.manual_seed(3)
    keys = {
        "vocab_size": 12,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.6,
    }
    if kind == "window":  # a sliding window: decoded by `generate`
        return MistralForCausalLM(MistralConfig(sliding_window=64, **keys)).eval()
    if kind == "recurrent":  # reads padding like any other token
        return RwkvForCausalLM(RwkvConfig(vocab_size=12, hidden_size=16, num_hidden_layers=2)).eval()
    return LlamaForCausalLM(LlamaConfig(**keys)).eval()


def found(
    model: Any, requests: list[SeededPrompt], sentences: int | None = None, **keys: Any
) -> list[list[Translation]]:
    def decode(rows: list[list[int]]) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]

    groups = hf_candidates(model, decode, [EOS], PAD, **keys)(requests, BatchLimits(100_000, sentences))
    entries = dict(entry for group in groups for entry in group)
    assert sorted(entries) == list(range(len(requests)))
    return [entries[index] for index in range(len(requests))]


@pytest.mark.parametrize("kind", ["full", "window"])
def test_samples_are_distributed_as_the_model_says(kind: str) -> None:
    """Chi-square over the second token: 11 degrees of freedom, and 42 is exceeded once in 50,000 times."""
    model, prompt = tiny(kind), [0, 5, 7]
    requests = [SeededPrompt(prompt, seed) for seed in range(4000)]
    made = found(model, requests, decoding=Decoding(max_new_tokens=2), drawing=Drawing())
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        rows = torch.tensor([[*prompt, token] for token in range(12)])
        second = model(rows).logits[:, -1].double().softmax(-1)
    expected = {"": float(first[EOS])}
    for token in range(12):
        if token != EOS:
            expected |= {f"{token}": float(first[token] * second[token, EOS])}
            expected |= {f"{token} {n}": float(first[token] * second[token, n]) for n in range(12) if n != EOS}
    counts: dict[str, int] = {}
    for one in made:
        counts[one[0].text] = counts.get(one[0].text, 0) + 1
    common = {text: share for text, share in expected.items() if share * len(requests) >= 10}
    statistic = sum((counts.get(t, 0) - s * len(requests)) ** 2 / (s * len(requests)) for t, s in common.items())
    freedom = len(common)
    assert len(common) > 10
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("kind", ["full", "window"])
def test_a_sample_depends_on_its_own_seed_alone(kind: str) -> None:
    model = tiny(kind)
    requests = [SeededPrompt([0, *range(3, 3 + length)], seed) for length in (2, 5, 2) for seed in range(4)]
    keys: dict[str, Any] = {"decoding": Decoding(max_new_tokens=9), "drawing": Drawing(temperature=1.3, top_k=8)}
    together = found(model, requests, **keys)
    assert together == found(model, requests, sentences=1, **keys)
    assert together == found(model, requests, sentences=5, **keys)
    assert together[::-1] == found(model, requests[::-1], **keys)
    assert together[:4] == together[8:]
    assert len({one[0].text for one in together[:4]}) > 1


def test_the_best_of_a_beam_are_those_of_transformers(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompts = [[0, *tokenizer.encode(text, add_special_tokens=False)] for text in ENGLISH[:4]]
    made = found(loaded, [SeededPrompt(p) for p in prompts], decoding=Decoding(num_beams=4, max_new_tokens=8), best=3)
    for prompt, translations in zip(prompts, made, strict=True):
        rows = loaded.generate(
            torch.tensor([prompt]),
            num_beams=4,
            num_return_sequences=3,
            max_new_tokens=8,
            eos_token_id=EOS,
            pad_token_id=PAD,
            do_sample=False,
        )[:, len(prompt) :].tolist()
        rows = [row[: row.index(EOS)] if EOS in row else row for row in rows]
        assert [one.text for one in translations] == [" ".join(map(str, row)) for row in rows]


texts = st.lists(st.text(alphabet="abä 你.\n", max_size=12), min_size=1, max_size=4)


@given(texts, texts)
def test_chrf_of_all_pairs_is_that_of_sacrebleu(left: list[str], right: list[str]) -> None:
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    expected = [[metric.sentence_score(one, [other]).score for other in right] for one in left]
    assert pairwise_chrf(left, right) == pytest.approx(np.array(expected), abs=1e-9)


SOURCE = "The old bridge over the river was closed for repairs last summer."
GOOD = Translation("Die alte Brücke über den Fluss war letzten Sommer wegen Reparaturen gesperrt.", 20, False)


@pytest.mark.parametrize(
    ("problem", "bad"),
    [
        (Problem.NO_TRANSLATION, Translation("", 0, False)),
        (Problem.HIT_LIMIT, Translation(GOOD.text, 20, True)),
        (
            Problem.OTHER_LANGUAGE,
            Translation("Le vieux moulin derrière la gare a été fermé l'été dernier.", 20, False),
        ),
        (Problem.LOOP, Translation("Die alte Brücke, die alte Brücke, die alte Brücke, die alte Brücke,", 20, False)),
        (Problem.LENGTH, Translation("Brücke zu.", 3, False)),
        (Problem.COPY, Translation(SOURCE, 20, False)),
    ],
)
def test_each_filter_finds_its_problem_and_can_be_left_out(problem: Problem, bad: Translation) -> None:
    assert find_problem(SOURCE, GOOD, "de", tuple(FILTERS)) is None
    [name] = [name for name, found in FILTERS.items() if found is problem]
    assert find_problem(SOURCE, bad, "de", [name]) is problem
    assert find_problem(SOURCE, bad, "de", [other for other in FILTERS if other != name]) is not problem


@pytest.mark.parametrize("kind", ["full", "window", "recurrent"])
@pytest.mark.parametrize("keys", [{"best": 3}, {"drawing": Drawing()}], ids=["beam", "samples"])
def test_candidates_are_those_of_each_prompt_alone(kind: str, keys: dict[str, Any]) -> None:
    model = tiny(kind)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    requests = [SeededPrompt([0, *range(3, 3 + length)], seed) for seed, length in enumerate((2, 8, 5, 3))]
    decoding = Decoding(max_new_tokens=6, num_beams=3 if "best" in keys else 1)
    expected = [found(model, [request], decoding=decoding, **keys)[0] for request in requests]
    assert found(model, requests, decoding=decoding, **keys) == expected
