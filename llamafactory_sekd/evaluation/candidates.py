"""Several translations of each sentence: the best ones of a beam, or samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig

from llamafactory_sekd.errors import one_line
from llamafactory_sekd.evaluation.architecture_probe import WayToDecode, explaining_positions
from llamafactory_sekd.evaluation.batching import plan_batches
from llamafactory_sekd.evaluation.decoding import hf_translate, in_inference_mode, left_pad, until_stop
from llamafactory_sekd.evaluation.evaluation_settings import Decoding
from llamafactory_sekd.evaluation.greedy import greedy_search
from llamafactory_sekd.evaluation.translator import BatchLimits, Translation
from llamafactory_sekd.trainer.sampling import InverseTransform, RowDraws, Sampling, uniforms_of


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn; ``top_k`` 0 keeps all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Request:
    """A translation to make: the prompt's tokens, and the seed of its random numbers."""

    prompt: list[int]
    seed: int = 0


# Requests and limits in; groups of (index into the requests, its translations) out, as they are finished.
Candidates = Callable[[Sequence[Request], BatchLimits], Iterator[list[tuple[int, list[Translation]]]]]

_Rows = Iterator[list[tuple[int, list[list[int]]]]]


def hf_candidates(
    model: Any,
    decode: Callable[[list[list[int]]], list[str]],
    stop_ids: Sequence[int],
    pad_id: int,
    decoding: Decoding,
    *,
    drawing: Drawing | None = None,
    best: int = 1,
) -> Candidates:
    """Return the function that makes translations with ``model``.

    With a ``drawing`` each request gets one sample, drawn with random numbers of its own: the same in any batch, on
    any number of ranks and after a restart. Otherwise each gets the ``best`` of greedy or beam search.
    """

    def finished(group: list[tuple[int, list[list[int]]]]) -> list[tuple[int, list[Translation]]]:
        rows = [[until_stop(row, stop_ids) for row in found] for _, found in group]
        texts = iter(decode([row for found in rows for row, _ in found]))
        return [
            (index, [Translation(one_line(next(texts)), len(row), hit_limit=not stopped) for row, stopped in found])
            for (index, _), found in zip(group, rows, strict=True)
        ]

    if drawing is None and best == 1:
        translate = hf_translate(model, decode, stop_ids, pad_id, decoding)

        def alone(requests: Sequence[Request], limits: BatchLimits) -> Iterator[list[tuple[int, list[Translation]]]]:
            for group in translate([request.prompt for request in requests], limits):
                yield [(index, [replace(one, text=one_line(one.text))]) for index, one in group]

        return alone

    model.generation_config = _configuration(decoding, stop_ids, pad_id, best)

    new_tokens = decoding.max_new_tokens
    way = WayToDecode(model, pad_id, new_tokens, greedy=drawing is not None)

    def several(requests: Sequence[Request], limits: BatchLimits) -> Iterator[list[tuple[int, list[Translation]]]]:
        prompts = [request.prompt for request in requests]
        way.ask(prompts)
        if drawing is not None and way.fast:
            pick = RowDraws(_sampling(drawing, decoding, stop_ids, pad_id), [request.seed for request in requests])
            found = greedy_search(model, prompts, stop_ids, pad_id, new_tokens, limits, pick)
            groups: _Rows = ([(index, [row]) for index, row in group] for group in found)
        else:
            limits = limits if way.padded else replace(limits, sentences=1)
            groups = _batches(model, requests, stop_ids, pad_id, decoding, limits, drawing, best)
        for group in in_inference_mode(explaining_positions(groups, model, prompts, new_tokens)):
            yield finished(group)

    return several


def _configuration(decoding: Decoding, stop_ids: Sequence[int], pad_id: int, best: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        num_beams=decoding.num_beams,
        num_return_sequences=best,
        max_new_tokens=decoding.max_new_tokens,
        length_penalty=decoding.length_penalty,
        repetition_penalty=decoding.repetition_penalty,
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
    )


def _sampling(drawing: Drawing, decoding: Decoding, stop_ids: Sequence[int], pad_id: int) -> Sampling:
    return Sampling(
        True, drawing.temperature, drawing.top_p, drawing.top_k, decoding.max_new_tokens, tuple(stop_ids), pad_id
    )


def _batches(
    model: Any,
    requests: Sequence[Request],
    stop_ids: Sequence[int],
    pad_id: int,
    decoding: Decoding,
    limits: BatchLimits,
    drawing: Drawing | None,
    best: int,
) -> Iterator[list[tuple[int, list[list[int]]]]]:
    """Yield ``(index into requests, new tokens of each translation)`` of batches that ``model.generate`` decodes."""
    lengths = [len(request.prompt) for request in requests]
    for batch in plan_batches(
        lengths, new_tokens=decoding.max_new_tokens, beams=max(best, decoding.num_beams), limits=limits
    ):
        tokens, mask = left_pad([requests[index].prompt for index in batch], pad_id)
        keys = {}
        if drawing is not None:
            processors = _sampling(drawing, decoding, stop_ids, pad_id).warpers()
            uniforms = torch.stack([uniforms_of(requests[index].seed, decoding.max_new_tokens) for index in batch])
            processors.append(InverseTransform(uniforms.to(model.device), tokens.shape[1]))
            keys["logits_processor"] = processors
        output = model.generate(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), **keys)
        rows = output[:, tokens.shape[1] :].tolist()
        yield [(index, rows[place * best : (place + 1) * best]) for place, index in enumerate(batch)]
