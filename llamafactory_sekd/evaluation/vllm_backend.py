"""Greedy decoding and samples with vLLM, which batches by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llamafactory_sekd.evaluation.decoding import Candidates, Drawing, SeededPrompt
from llamafactory_sekd.evaluation.evaluation_settings import Decoding
from llamafactory_sekd.evaluation.systems import BatchLimits, Translate, Translation


# Sentences handed over at a time: enough to keep vLLM busy, few enough that a killed run loses a minute.
_SENTENCES = 512


def vllm_translate(
    engine: Any,
    stop_ids: Sequence[int],
    decoding: Decoding,
    lora_request: Any = None,
    skip_special_tokens: bool = True,
) -> Translate:
    """Return the function that translates with ``engine``, a ``vllm.LLM``.

    ``lora_request`` is vLLM's, for an adapter. Special tokens stay in the text where thoughts are told by them.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=decoding.max_new_tokens,
        repetition_penalty=decoding.repetition_penalty,
        stop_token_ids=list(stop_ids),
        skip_special_tokens=skip_special_tokens,
    )

    def translate(prompts: Sequence[list[int]], limits: BatchLimits) -> Iterator[list[tuple[int, Translation]]]:
        for start in range(0, len(prompts), _SENTENCES):
            yield _answers(engine, prompts[start : start + _SENTENCES], sampling, lora_request, start)

    return translate


def vllm_candidates(
    engine: Any,
    stop_ids: Sequence[int],
    decoding: Decoding,
    drawing: Drawing | None,
    lora_request: Any = None,
    skip_special_tokens: bool = True,
) -> Candidates:
    """Return the function that makes one translation of each request with ``engine``: a sample, or the greedy one."""
    from vllm import SamplingParams

    translate = vllm_translate(engine, stop_ids, decoding, lora_request, skip_special_tokens)

    def draw(requests: Sequence[SeededPrompt], drawing: Drawing) -> Iterator[list[tuple[int, Translation]]]:
        for start in range(0, len(requests), _SENTENCES):
            part = requests[start : start + _SENTENCES]
            samplings = [
                SamplingParams(
                    temperature=drawing.temperature,
                    top_p=drawing.top_p,
                    top_k=drawing.top_k or -1,
                    seed=request.seed,
                    max_tokens=decoding.max_new_tokens,
                    stop_token_ids=list(stop_ids),
                    skip_special_tokens=skip_special_tokens,
                )
                for request in part
            ]
            yield _answers(engine, [request.prompt for request in part], samplings, lora_request, start)

    def make(requests: Sequence[SeededPrompt], limits: BatchLimits) -> Iterator[list[tuple[int, list[Translation]]]]:
        if drawing is None:
            groups = translate([request.prompt for request in requests], limits)
        else:
            groups = draw(requests, drawing)
        for group in groups:
            yield [(index, [translation.in_one_line()]) for index, translation in group]

    return make


def _answers(
    engine: Any, prompts: Sequence[list[int]], sampling: Any, lora_request: Any, start: int
) -> list[tuple[int, Translation]]:
    """Return the translations of ``prompts``, the first of which is number ``start``."""
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        sampling_params=sampling,
        lora_request=lora_request,
        use_tqdm=False,
    )
    answers = [output.outputs[0] for output in outputs]
    return [
        (start + place, Translation(one.text.strip(), len(one.token_ids), one.finish_reason == "length"))
        for place, one in enumerate(answers)
    ]
