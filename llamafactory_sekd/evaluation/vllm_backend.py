"""Greedy decoding and samples with vLLM, which batches by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from llamafactory_sekd.errors import one_line
from llamafactory_sekd.evaluation.candidates import Candidates, Drawing, Request
from llamafactory_sekd.evaluation.evaluation_settings import Decoding
from llamafactory_sekd.evaluation.translator import BatchLimits, Translate, Translation


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
            outputs = engine.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts[start : start + _SENTENCES]],
                sampling_params=sampling,
                lora_request=lora_request,
                use_tqdm=False,
            )
            yield [(start + place, _translation(output.outputs[0])) for place, output in enumerate(outputs)]

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

    if drawing is None:
        translate = vllm_translate(engine, stop_ids, decoding, lora_request, skip_special_tokens)
        return lambda requests, limits: (
            [(index, [_in_one_line(translation)]) for index, translation in group]
            for group in translate([request.prompt for request in requests], limits)
        )

    def sampling(request: Request) -> Any:
        return SamplingParams(
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            top_k=drawing.top_k or -1,
            seed=request.seed,
            max_tokens=decoding.max_new_tokens,
            stop_token_ids=list(stop_ids),
            skip_special_tokens=skip_special_tokens,
        )

    def several(requests: Sequence[Request], limits: BatchLimits) -> Iterator[list[tuple[int, list[Translation]]]]:
        for start in range(0, len(requests), _SENTENCES):
            part = requests[start : start + _SENTENCES]
            outputs = engine.generate(
                [{"prompt_token_ids": request.prompt} for request in part],
                sampling_params=[sampling(request) for request in part],
                lora_request=lora_request,
                use_tqdm=False,
            )
            yield [
                (start + place, [_in_one_line(_translation(output.outputs[0]))])
                for place, output in enumerate(outputs)
            ]

    return several


def _translation(output: Any) -> Translation:
    return Translation(output.text.strip(), len(output.token_ids), output.finish_reason == "length")


def _in_one_line(translation: Translation) -> Translation:
    return replace(translation, text=one_line(translation.text))
