"""Greedy decoding with vLLM, which batches by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llamafactory_sekd.errors import one_line
from llamafactory_sekd.evaluation.settings import Decoding
from llamafactory_sekd.evaluation.translator import BatchLimits, Translate, Translation


# Sentences handed over at a time: enough to keep vLLM busy, few enough that a killed run loses a minute.
_SENTENCES = 512


def vllm_translate(engine: Any, stop_ids: Sequence[int], decoding: Decoding, lora_request: Any = None) -> Translate:
    """Return the function that translates with ``engine``, a ``vllm.LLM``.

    ``lora_request`` is vLLM's, for an adapter.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=decoding.max_new_tokens,
        repetition_penalty=decoding.repetition_penalty,
        stop_token_ids=list(stop_ids),
        skip_special_tokens=True,
    )

    def translate(prompts: Sequence[list[int]], limits: BatchLimits) -> Iterator[list[tuple[int, Translation]]]:
        for start in range(0, len(prompts), _SENTENCES):
            outputs = engine.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts[start : start + _SENTENCES]],
                sampling_params=sampling,
                lora_request=lora_request,
                use_tqdm=False,
            )
            firsts = [output.outputs[0] for output in outputs]
            yield [
                (
                    start + place,
                    Translation(one_line(first.text), len(first.token_ids), first.finish_reason == "length"),
                )
                for place, first in enumerate(firsts)
            ]

    return translate
