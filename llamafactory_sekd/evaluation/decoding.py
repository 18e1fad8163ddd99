"""Greedy decoding, beam search and samples with a Hugging Face model.

Whether its sentences may share a batch is a question to the model itself, whose answer no configuration states.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig

from llamafactory_sekd.errors import EvaluationError, one_line
from llamafactory_sekd.evaluation.evaluation_settings import Decoding
from llamafactory_sekd.evaluation.greedy import (
    batch_size,
    can_share_cache,
    greedy_search,
    last_logits,
    left_pad,
    step_logits,
)
from llamafactory_sekd.evaluation.systems import BatchLimits, Translate, Translation
from llamafactory_sekd.trainer.sampling import InverseTransform, RowDraws, Sampling, uniforms_of


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn; ``top_k`` 0 keeps all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class SeededPrompt:
    """A translation to make: the prompt's tokens, and the seed of its random numbers."""

    prompt: list[int]
    seed: int = 0


# Prompts and limits in; groups of (index into the prompts, its translations) out, as they are finished.
Candidates = Callable[[Sequence[SeededPrompt], BatchLimits], Iterator[list[tuple[int, list[Translation]]]]]

_Rows = Iterator[list[tuple[int, list[list[int]]]]]
_Group = TypeVar("_Group")


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
    search = _Search(model, stop_ids, pad_id, decoding, None, 1)

    def translate(prompts: Sequence[list[int]], limits: BatchLimits) -> Iterator[list[tuple[int, Translation]]]:
        for group in search.translations([SeededPrompt(prompt) for prompt in prompts], limits, decode):
            yield [(index, found[0]) for index, found in group]

    return translate


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
    """Return the function that makes translations with ``model``, each in one line.

    With a ``drawing`` each prompt gets one sample, drawn with random numbers of its own: the same in any batch, on
    any number of ranks and after a restart. Otherwise each gets the ``best`` of greedy or beam search.
    """
    search = _Search(model, stop_ids, pad_id, decoding, drawing, best)

    def make(prompts: Sequence[SeededPrompt], limits: BatchLimits) -> Iterator[list[tuple[int, list[Translation]]]]:
        for group in search.translations(prompts, limits, decode):
            yield [(index, [one.in_one_line() for one in found]) for index, found in group]

    return make


class _Search:
    """Looks for translations: one sample of each prompt where there is a ``drawing``, the ``best`` ones otherwise."""

    def __init__(
        self,
        model: Any,
        stop_ids: Sequence[int],
        pad_id: int,
        decoding: Decoding,
        drawing: Drawing | None,
        best: int,
    ) -> None:
        # A checkpoint's own defaults (sampling, often) fill whatever looks unset in a configuration that is passed
        # along with the call; replacing them is the one way that no version of transformers reads differently.
        model.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=decoding.num_beams,
            num_return_sequences=best,
            max_new_tokens=decoding.max_new_tokens,
            length_penalty=decoding.length_penalty,
            repetition_penalty=decoding.repetition_penalty,
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
        )
        self._model, self._stop_ids, self._pad_id = model, stop_ids, pad_id
        self._new_tokens, self._beams, self._best = decoding.max_new_tokens, max(best, decoding.num_beams), best
        self._sampling = (
            Sampling(
                True,
                drawing.temperature,
                drawing.top_p,
                drawing.top_k,
                decoding.max_new_tokens,
                tuple(stop_ids),
                pad_id,
            )
            if drawing is not None
            else None
        )
        # Beam search reorders its cache, and a penalty on repetition looks at the padding too: transformers does these
        # alone.
        greedy = decoding.num_beams == 1 and decoding.repetition_penalty == 1.0
        self._way = WayToDecode(model, pad_id, decoding.max_new_tokens, greedy=greedy)

    def translations(
        self, requests: Sequence[SeededPrompt], limits: BatchLimits, decode: Callable[[list[list[int]]], list[str]]
    ) -> Iterator[list[tuple[int, list[Translation]]]]:
        """Yield groups of (index into ``requests``, its translations) as they are finished."""
        if not requests:  # the share of a rank too many
            return
        prompts = [request.prompt for request in requests]
        self._way.ask(prompts)
        if self._way.fast:
            groups = self._together(requests, prompts, limits)
        else:
            groups = self._in_batches(requests, limits if self._way.padded else replace(limits, sentences=1))
        for group in in_inference_mode(explaining_positions(groups, self._model, prompts, self._new_tokens)):
            rows = [[until_stop(row, self._stop_ids) for row in found] for _, found in group]
            texts = iter(decode([row for found in rows for row, _ in found]))
            yield [
                (index, [Translation(next(texts).strip(), len(row), hit_limit=not stopped) for row, stopped in found])
                for (index, _), found in zip(group, rows, strict=True)
            ]

    def _together(self, requests: Sequence[SeededPrompt], prompts: list[list[int]], limits: BatchLimits) -> _Rows:
        pick = RowDraws(self._sampling, [request.seed for request in requests]) if self._sampling is not None else None
        found = greedy_search(self._model, prompts, self._stop_ids, self._pad_id, self._new_tokens, limits, pick)
        return ([(index, [row]) for index, row in group] for group in found)

    def _in_batches(self, requests: Sequence[SeededPrompt], limits: BatchLimits) -> _Rows:
        """Yield (index into ``requests``, new tokens of each translation) of batches that ``generate`` decodes."""
        device, best = self._model.device, self._best
        lengths = [len(request.prompt) for request in requests]
        for batch in plan_batches(lengths, new_tokens=self._new_tokens, beams=self._beams, limits=limits):
            tokens, mask = left_pad([requests[index].prompt for index in batch], self._pad_id)
            keys = {}
            if self._sampling is not None:
                processors = self._sampling.warpers()
                uniforms = torch.stack([uniforms_of(requests[index].seed, self._new_tokens) for index in batch])
                processors.append(InverseTransform(uniforms.to(device), tokens.shape[1]))
                keys["logits_processor"] = processors
            output = self._model.generate(input_ids=tokens.to(device), attention_mask=mask.to(device), **keys)
            rows = output[:, tokens.shape[1] :].tolist()
            yield [(index, rows[place * best : (place + 1) * best]) for place, index in enumerate(batch)]


def plan_batches(lengths: Sequence[int], *, new_tokens: int, beams: int, limits: BatchLimits) -> Iterator[list[int]]:
    """Yield batches of indices into ``lengths`` (prompt tokens).

    Sentences of like length share a batch, so little is padded and all end at about the same step. The longest come
    first, so memory that does not suffice shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        size = batch_size(lengths[order[start]], new_tokens=new_tokens, beams=beams, limits=limits)
        yield order[start : start + size]
        start += size


def in_inference_mode(groups: Iterator[_Group]) -> Iterator[_Group]:
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


# Model, rows and padding in; logits the way they are decoded together and those of each row alone out.
_Probe = Callable[[Any, Sequence[list[int]], int], tuple[torch.Tensor, torch.Tensor]]
_STEPS = 3  # of `generate`, so that its cache is asked too


class WayToDecode:
    """How the sentences of a model may be decoded together: found by asking it, up to the longest that it was asked.

    Attributes:
        fast: by :func:`greedy_search`.
        padded: by ``generate`` in batches of different lengths; otherwise each sentence has to be alone.
    """

    def __init__(self, model: Any, pad_id: int, new_tokens: int, *, greedy: bool) -> None:
        self.fast = greedy and can_share_cache(model)
        self.padded = True
        self._model, self._pad_id, self._new_tokens = model, pad_id, new_tokens
        self._asked = 0

    def ask(self, prompts: Sequence[list[int]]) -> None:
        """Ask the model, unless it has answered for prompts of this length already."""
        longest = max(map(len, prompts), default=0)
        if longest <= self._asked:
            return
        self._asked = longest
        limit = longest_sequence(self._model)
        if limit is not None and longest >= limit:
            logger.warning(
                f"The longest prompt has {longest} tokens, and {type(self._model).__name__} was made for {limit}: "
                "its output after such a prompt is unreliable."
            )
        arguments = (self._model, prompts, self._pad_id, self._new_tokens)
        self.fast = self.fast and agrees_with_plain_forward(*arguments)
        self.padded = self.fast or (self.padded and agrees_when_padded(*arguments))


def agrees_with_plain_forward(model: Any, prompts: Sequence[list[int]], pad_id: int, new_tokens: int) -> bool:
    """Ask the model itself whether :func:`greedy_search` may be used with it.

    Padding anywhere, positions counted from a mask, and a cache that rows join and leave are assumptions about the
    architecture that nothing in a configuration states: models with ALiBi, for one, count positions their own way and
    would translate wrongly without an error. So two rows of different lengths take the prompt's and one further step,
    and their logits are compared with those of each row alone, without padding, mask or cache. One row is as short as
    a prompt can be and the other as long as a translation of these prompts can become, for local attention and
    positions that are scaled by the length show beyond some length only.
    """
    return _agrees(model, prompts, _stepped, pad_id, new_tokens, "decoded by `generate`")


def agrees_when_padded(model: Any, prompts: Sequence[list[int]], pad_id: int, new_tokens: int) -> bool:
    """Ask the model whether ``generate`` may decode prompts of different lengths together, see above."""
    return _agrees(model, prompts, _generated, pad_id, new_tokens, "decoded one sentence at a time")


def longest_sequence(model: Any) -> int | None:
    """Return how many positions the model was made for, where its configuration says so."""
    limit = getattr(model.config, "max_position_embeddings", getattr(model.config, "max_seq_len", None))
    return limit if isinstance(limit, int) and limit > 0 else None


def explaining_positions(
    groups: Iterator[_Group], model: Any, prompts: Sequence[list[int]], new_tokens: int
) -> Iterator[_Group]:
    """Pass ``groups`` on; what a model raises beyond the last of its positions becomes one line.

    Raises:
        EvaluationError: the model has failed, and prompts and translations may be longer than it can read.
    """
    longest, limit = max(map(len, prompts), default=0), longest_sequence(model)
    try:
        yield from groups
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        if limit is None or longest + new_tokens <= limit:
            raise
        raise EvaluationError(
            f"{type(model).__name__} reads up to {limit} tokens, and the longest prompt ({longest}) with a "
            f"translation of `max_new_tokens: {new_tokens}` has more: lower `max_new_tokens`, shorten the prompts, "
            f"or take another model ({one_line(str(error))[:120]})."
        ) from error


def _agrees(
    model: Any, prompts: Sequence[list[int]], probe: _Probe, pad_id: int, new_tokens: int, otherwise: str
) -> bool:
    name = type(model).__name__
    try:
        rows = _rows(model, prompts, new_tokens)
        with torch.inference_mode():
            found, expected = probe(model, rows, pad_id)
    except Exception as error:  # code of any architecture, which may stumble over any of these assumptions
        logger.info(f"{name} is {otherwise}: {one_line(str(error))}")
        return False

    # Rounding in half precision moves logits by about a hundredth of their spread; a wrong position by all of it.
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    distance = float((found - expected).abs().amax() / expected.std().clamp(min=1e-6))
    if not distance <= tolerance:
        logger.info(
            f"{name} is {otherwise}: with padding its logits are not those of each prompt alone (off by "
            f"{distance:.2g} of their spread)."
        )
        return False
    return True


def _rows(model: Any, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """Return a row as long as prompt and translation can become, and a short one, with one beginning."""
    limit = longest_sequence(model)
    length = max(map(len, prompts)) + new_tokens - _STEPS
    # Ordinary positions beyond the limit are like those below it, or do not exist.
    if limit is not None and not getattr(model.config, "rope_scaling", None):
        length = min(length, limit)
    text = [token for prompt in sorted(prompts, key=len, reverse=True)[:64] for token in prompt]
    text = (text * (length // len(text) + 1))[: max(length, 10)]
    return [text, [text[0], *prompts[-1][-4:]]]


def _stepped(model: Any, rows: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the prompts' and of one further step, ``[2 * rows, vocab]`` each."""
    return step_logits(model, rows, pad_id), _plain(model, rows, 2)


def _generated(model: Any, rows: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the first steps of ``generate``, ``[steps * rows, vocab]`` each."""
    ids, mask = left_pad(rows, pad_id)
    width = ids.shape[1]
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=_STEPS,
        min_new_tokens=_STEPS,
        num_beams=1,
        do_sample=False,
        repetition_penalty=1.0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new = output.sequences[:, width:-1].tolist()
    found = torch.cat([logits.float() for logits in output.logits])
    return found, _plain(model, [[*row, *tokens] for row, tokens in zip(rows, new, strict=True)], _STEPS)


def _plain(model: Any, rows: Sequence[list[int]], last: int) -> torch.Tensor:
    """Return the logits at the ``last`` places of each row alone, ``[last * rows, vocab]``."""
    keys = last_logits(model, last)
    alone = [
        model(input_ids=torch.tensor([row], device=model.device), **keys).logits[0, -last:].float() for row in rows
    ]
    return torch.stack(alone, dim=1).flatten(0, 1)
