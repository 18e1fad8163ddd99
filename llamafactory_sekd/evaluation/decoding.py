"""Greedy and beam search with a Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig

from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.architecture_probe import WayToDecode, explaining_positions
from llamafactory_sekd.evaluation.batching import plan_batches
from llamafactory_sekd.evaluation.evaluation_settings import Decoding
from llamafactory_sekd.evaluation.greedy import greedy_search
from llamafactory_sekd.evaluation.translator import BatchLimits, Translate, Translation


def hf_translate(
    model: Any,
    decode: Callable[[list[list[int]]], list[str]],
    stop_ids: Sequence[int],
    pad_id: int,
    decoding: Decoding,
) -> Translate:
    """Return the function that translates prompts with ``model``.

    ``decode`` turns token ids into text, special tokens left out; generation of a sentence ends at any of
    ``stop_ids``. The function raises :class:`EvaluationError` when the GPU's memory does not suffice.
    """
    # A checkpoint's own defaults (sampling, often) fill whatever looks unset in a configuration that is passed along
    # with the call; replacing them is the one way that no version of transformers reads differently.
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=decoding.num_beams,
        max_new_tokens=decoding.max_new_tokens,
        length_penalty=decoding.length_penalty,
        repetition_penalty=decoding.repetition_penalty,
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
    )
    # Beam search reorders its cache, and a penalty on repetition looks at the padding too: transformers does these
    # alone.
    new_tokens = decoding.max_new_tokens
    greedy = decoding.num_beams == 1 and decoding.repetition_penalty == 1.0
    way = WayToDecode(model, pad_id, new_tokens, greedy=greedy)

    def translate(prompts: Sequence[list[int]], limits: BatchLimits) -> Iterator[list[tuple[int, Translation]]]:
        if not prompts:  # the share of a rank too many
            return
        way.ask(prompts)
        if way.fast:
            groups = greedy_search(model, prompts, stop_ids, pad_id, new_tokens, limits)
        else:
            limits = limits if way.padded else replace(limits, sentences=1)
            groups = fixed_batches(model, prompts, pad_id, decoding, limits)
        groups = explaining_positions(groups, model, prompts, new_tokens)
        for group in in_inference_mode(groups):
            rows = [until_stop(row, stop_ids) for _, row in group]
            texts = decode([row for row, _ in rows])
            yield [
                (index, Translation(text.strip(), len(row), hit_limit=not stopped))
                for (index, _), text, (row, stopped) in zip(group, texts, rows, strict=True)
            ]

    return translate


def fixed_batches(
    model: Any, prompts: Sequence[list[int]], pad_id: int, decoding: Decoding, limits: BatchLimits
) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield ``(index into prompts, new tokens)`` of batches that ``model.generate`` decodes from beginning to end."""
    lengths = [len(prompt) for prompt in prompts]
    new_tokens, beams = decoding.max_new_tokens, decoding.num_beams
    for batch in plan_batches(lengths, new_tokens=new_tokens, beams=beams, limits=limits):
        tokens, mask = left_pad([prompts[index] for index in batch], pad_id)
        output = model.generate(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device))
        yield list(zip(batch, output[:, tokens.shape[1] :].tolist(), strict=True))


def left_pad(prompts: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask``, both int64 ``[batch, longest]``, with the padding on the left."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask


_Rows = TypeVar("_Rows")


def in_inference_mode(groups: Iterator[_Rows]) -> Iterator[_Rows]:
    """Pass ``groups`` on, computed without gradients; a context around the loop would leak to its consumer."""
    while True:
        try:
            with torch.inference_mode():
                group = next(groups, None)
        except torch.OutOfMemoryError:
            raise EvaluationError(
                "The GPU's memory does not hold the batch: lower `batch_tokens` or `batch_size` and run again; "
                "what is translated is kept."
            ) from None
        if group is None:
            return
        yield group


def until_stop(tokens: list[int], stop_ids: Sequence[int]) -> tuple[list[int], bool]:
    """Return the tokens before the first stop token, and whether there is one."""
    end = next((index for index, token in enumerate(tokens) if token in stop_ids), None)
    return (tokens, False) if end is None else (tokens[:end], True)
