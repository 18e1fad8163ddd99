"""Questions to a model whose answers no configuration states: how may its sentences be decoded together?"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from llamafactory_sekd.errors import EvaluationError, one_line
from llamafactory_sekd.evaluation.greedy import can_share_cache, inner_model, step_logits


logger = logging.getLogger(__name__)

# Model, rows and padding in; logits the way they are decoded together and those of each row alone out.
_Probe = Callable[[Any, Sequence[list[int]], int], tuple[torch.Tensor, torch.Tensor]]
_STEPS = 3  # of `generate`, so that its cache is asked too
_Group = TypeVar("_Group")


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
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
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
    only_last = "logits_to_keep" in inspect.signature(inner_model(model).forward).parameters
    keys = {"logits_to_keep": last} if only_last else {}
    alone = [
        model(input_ids=torch.tensor([row], device=model.device), **keys).logits[0, -last:].float() for row in rows
    ]
    return torch.stack(alone, dim=1).flatten(0, 1)
