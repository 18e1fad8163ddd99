"""What is asked of vLLM and what becomes of its answers. vLLM itself does not run here: a stand-in answers."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from llamafactory_sekd.evaluation.decoding import Drawing, SeededPrompt
from llamafactory_sekd.evaluation.evaluation_settings import Decoding
from llamafactory_sekd.evaluation.systems import BatchLimits, Translation
from llamafactory_sekd.evaluation.vllm_backend import vllm_candidates, vllm_translate


class Engine:
    """Answers each prompt with its first token, in the order of the prompts, as ``vllm.LLM.generate`` does."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Any, Any]] = []

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling_params: Any, lora_request: Any, use_tqdm: bool
    ) -> Any:
        self.calls.append((len(prompts), sampling_params, lora_request))
        for prompt in prompts:
            first = prompt["prompt_token_ids"][0]
            reason = "length" if first % 2 else "stop"
            output = SimpleNamespace(text=f" Satz\n{first} ", token_ids=[first] * 3, finish_reason=reason)
            yield SimpleNamespace(outputs=[output])


def test_answers_keep_their_places_and_the_keys_reach_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    engine = Engine()
    translate = vllm_translate(
        engine, [2, 7], Decoding(backend="vllm", max_new_tokens=9, repetition_penalty=1.1), "adapter"
    )
    groups = list(translate([[number, 5] for number in range(700)], BatchLimits(1)))
    found = dict(entry for group in groups for entry in group)
    assert found == {number: Translation(f"Satz\n{number}", 3, bool(number % 2)) for number in range(700)}
    assert sum(size for size, _, _ in engine.calls) == 700
    _, sampling, adapter = engine.calls[0]
    assert adapter == "adapter"
    assert vars(sampling) == {
        "temperature": 0.0,
        "max_tokens": 9,
        "repetition_penalty": 1.1,
        "stop_token_ids": [2, 7],
        "skip_special_tokens": True,
    }


def test_each_sample_brings_its_own_seed_and_stays_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    engine = Engine()
    drawing = Drawing(temperature=0.8, top_p=0.9, top_k=0)
    candidates = vllm_candidates(engine, [2], Decoding(backend="vllm", max_new_tokens=9), drawing)
    requests = [SeededPrompt([number, 5], 1000 + number) for number in range(700)]
    found = dict(entry for group in candidates(requests, BatchLimits(1)) for entry in group)
    assert found == {number: [Translation(f"Satz {number}", 3, bool(number % 2))] for number in range(700)}
    sampled = [sampling for _, part, _ in engine.calls for sampling in part]
    assert [sampling.seed for sampling in sampled] == [request.seed for request in requests]
    assert {(s.temperature, s.top_p, s.top_k, s.max_tokens) for s in sampled} == {(0.8, 0.9, -1, 9)}

    greedy = vllm_candidates(Engine(), [2], Decoding(backend="vllm", max_new_tokens=9), None)
    assert dict(entry for group in greedy(requests, BatchLimits(1)) for entry in group) == found
