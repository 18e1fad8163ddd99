"""Greedy decoding without the waste of fixed batches.

A sentence that has ended would cost as much as one that has not for as long as its batch lasts; here it leaves, and
the next one takes its place. All prompts of a direction begin alike, so the beginning goes through the model once
and not once per sentence. And the attention mask is kept, where ``generate`` has the model build it again for every
token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from llamafactory_sekd.evaluation.systems import BatchLimits


# What follows: logits float32 [rows, vocab], the prompts' indices and the numbers of the new tokens in; tokens out.
Pick = Callable[[torch.Tensor, list[int], list[int]], torch.Tensor]

# The batch is repacked when this share of its sentences has ended. Repacking costs about as much as two steps.
_ENDED_SHARE = 0.25


def batch_size(longest: int, *, new_tokens: int, beams: int, limits: BatchLimits) -> int:
    """Return how many sentences with prompts of up to ``longest`` tokens may be decoded together, at least one.

    As many as fit ``limits.tokens`` when every beam of every sentence runs to its limit, which bounds the key-value
    cache: sentences x ``beams`` x (``longest`` + ``new_tokens``); at most ``limits.sentences``.
    """
    size = max(1, limits.tokens // (beams * (longest + new_tokens)))
    return size if limits.sentences is None else min(size, limits.sentences)


def left_pad(prompts: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask``, both int64 ``[batch, longest]``, with the padding on the left."""
    rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")


def can_share_cache(model: Any) -> bool:
    """Tell whether every layer keeps the keys and values of all positions, which is what :func:`greedy_search` needs.

    Sliding windows, recurrent states, multimodal positions, code that comes with a checkpoint and older releases of
    transformers are left to ``generate``.
    """
    config = model.config
    # Whatever is not known to be plain is left out: a wrong mask would show as worse translations, not as an error.
    if type(_inner_model(model)).__module__.startswith("transformers_modules"):
        return False
    if config.is_encoder_decoder or getattr(model, "_is_stateful", False) or config.get_text_config() is not config:
        return False
    try:
        layers = DynamicCache(config=config).layers
    except (TypeError, AttributeError):
        return False
    return all(type(layer).__name__ == "DynamicLayer" for layer in layers)


def step_logits(model: Any, rows: Sequence[list[int]], pad_id: int) -> torch.Tensor:
    """Return the logits ``[2 * rows, vocab]`` after the prompts and after one more token, the way a batch makes them.

    The last token of each row is the one that is decoded; all rows begin with the same token.
    """
    prompts = [row[:-1] for row in rows]
    batch = _Batch(model, prompts, 1, (), pad_id, 2)
    forward = _Forward(model)
    tokens, mask = batch._pad_rest(prompts)
    cache = deepcopy(batch._prefix_cache)
    cache.batch_repeat_interleave(len(rows))
    prompt = forward.logits(tokens, mask, cache)
    last = torch.tensor([row[-1] for row in rows], device=model.device)
    step = forward.logits(last[:, None], pad(mask, (0, 1), value=True), cache)
    return torch.cat([prompt, step])


def greedy_search(
    model: Any,
    prompts: Sequence[list[int]],
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    limits: BatchLimits,
    pick: Pick | None = None,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield groups of ``(index into prompts, new tokens)`` as they end, all of them in the end.

    The tokens are those that ``model.generate`` finds for each prompt alone, rounding aside, up to and including the
    stop token; what follows it is without meaning. ``pick`` chooses each token in place of the most likely
    one.
    """
    # The longest first: memory that does not suffice shows at once. Equal prompts are neighbors and share one pass.
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), prompts[index], index))
    batch = _Batch(model, prompts, _common_prefix(prompts), stop_ids, pad_id, max_new_tokens, pick)
    waiting = 0
    while waiting < len(order) or batch.places:
        longest = max(len(prompts[index]) for index in [*batch.places, *order[waiting : waiting + 1]])
        size = batch_size(longest, new_tokens=max_new_tokens, beams=1, limits=limits)
        free = size - len(batch.places)
        # New sentences first: a step costs nearly the same for a full batch as for one that is half empty.
        if waiting < len(order) and free > 0:
            batch.admit(order[waiting : waiting + free])
            waiting += free
        else:
            batch.decode()
        ended = batch.release()
        if ended:
            yield ended


class _Batch:
    """The sentences that are being decoded.

    ``places`` are their indices, ``made`` their new tokens. ``_mask``, bool ``[rows, width]``, says which columns of
    the cache belong to a row: padding may stand anywhere, since positions are counted from the mask. ``_last``,
    int64 ``[rows]``, are the newest tokens, which have not gone through the model yet.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        shared: int,
        stop_ids: Sequence[int],
        pad_id: int,
        max_new_tokens: int,
        pick: Pick | None = None,
    ) -> None:
        self.places: list[int] = []
        self.made: list[list[int]] = []
        self._forward = _Forward(model)
        self._pick = pick
        self._prompts = prompts
        self._stop_ids = frozenset(stop_ids)
        self._stops = torch.tensor(list(stop_ids), device=model.device)
        self._pad_id = pad_id
        self._max_new_tokens = max_new_tokens
        self._prefix = prompts[0][:shared]
        self._prefix_cache = DynamicCache(config=model.config)
        # Once for all sentences: an instruction in front of a short sentence is most of its prompt.
        if shared:
            prefix = torch.tensor([self._prefix], device=model.device)
            self._forward.logits(prefix, torch.ones_like(prefix, dtype=torch.bool), self._prefix_cache)
        self._last = torch.empty(0, dtype=torch.long, device=model.device)
        self._mask = torch.empty((0, 0), dtype=torch.bool, device=model.device)
        self._cache = DynamicCache(config=model.config)

    def admit(self, places: list[int]) -> None:
        """Take in new sentences and find their first tokens."""
        # Several samples of a sentence stand next to each other, and its prompt goes through the model once.
        different = list(dict.fromkeys(tuple(self._prompts[place]) for place in places))
        tokens, mask = self._pad_rest([list(prompt) for prompt in different])
        # A forward pass appends to its cache in place, and later sentences begin alike.
        cache = deepcopy(self._prefix_cache)
        if self._prefix:
            cache.batch_repeat_interleave(len(different))
        logits = self._forward.logits(tokens, mask, cache)
        if len(different) < len(places):
            row_of = {prompt: row for row, prompt in enumerate(different)}
            rows = torch.tensor([row_of[tuple(self._prompts[place])] for place in places], device=mask.device)
            mask, logits = mask[rows], logits[rows.to(logits.device)]
            cache.batch_select_indices(rows)
        first = self._choose(logits, places, [0] * len(places))
        self._join(first, mask, cache)
        self.places += places
        self.made += [[token] for token in first.tolist()]

    def decode(self) -> None:
        """Decode until so many sentences have ended, or one has come to its limit, that it is time to repack."""
        enough = max(1, int(len(self.places) * _ENDED_SHARE))
        ended = torch.zeros(len(self.places), dtype=torch.bool, device=self._last.device)
        new: list[torch.Tensor] = []
        # No further than to the first sentence that reaches its limit, so the limit needs no look at the tokens.
        for step in range(self._max_new_tokens - max(map(len, self.made))):
            self._mask = pad(self._mask, (0, 1), value=True)
            logits = self._forward.logits(self._last[:, None], self._mask, self._cache)
            self._last = self._choose(logits, self.places, [len(row) + step for row in self.made])
            new.append(self._last)
            ended |= torch.isin(self._last, self._stops)
            # Until then rows that have ended go along, and what follows their stop tokens is cut off: that costs less
            # than taking them out one by one. This is the one wait for an accelerator in a step.
            if int(ended.sum()) >= enough:
                break
        for row, tokens in zip(self.made, torch.stack(new, dim=1).tolist(), strict=True):
            row += tokens

    def _choose(self, logits: torch.Tensor, places: list[int], numbers: list[int]) -> torch.Tensor:
        tokens = logits.argmax(dim=-1) if self._pick is None else self._pick(logits, places, numbers)
        return tokens.to(self._last.device)

    def release(self) -> list[tuple[int, list[int]]]:
        """Let the sentences go that have ended, and return them; columns that nobody needs any more go with them."""
        ended = [len(row) >= self._max_new_tokens or not self._stop_ids.isdisjoint(row) for row in self.made]
        if not any(ended):
            return []
        gone = [(place, row) for place, row, out in zip(self.places, self.made, ended, strict=True) if out]
        staying = [number for number, out in enumerate(ended) if not out]
        self.places = [self.places[number] for number in staying]
        self.made = [self.made[number] for number in staying]
        rows = torch.tensor(staying, dtype=torch.long, device=self._last.device)
        # Padding and the tokens of rows that left: without this the cache would grow from batch to batch.
        columns = self._mask[rows].any(dim=0).nonzero().flatten()
        self._last, self._mask = self._last[rows], self._mask[rows][:, columns]
        for layer in self._cache.layers:
            # The layers of a large model may lie on several devices.
            rows, columns = rows.to(layer.keys.device), columns.to(layer.keys.device)
            layer.keys = layer.keys[rows][:, :, columns]
            layer.values = layer.values[rows][:, :, columns]
        return gone

    def _join(self, last: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> None:
        """Put new rows below the present ones; the narrower of the two is padded on the left."""
        if not self.places:
            self._last, self._mask, self._cache = last, mask, cache
            return
        # On the left, so that the newest column is the same for all rows and a step appends one column to each.
        width = max(self._mask.shape[1], mask.shape[1])
        before, after = width - self._mask.shape[1], width - mask.shape[1]
        self._last = torch.cat([self._last, last])
        self._mask = torch.cat([pad(self._mask, (before, 0)), pad(mask, (after, 0))])
        for old, new in zip(self._cache.layers, cache.layers, strict=True):
            old.keys = torch.cat([pad(old.keys, (0, 0, before, 0)), pad(new.keys, (0, 0, after, 0))])
            old.values = torch.cat([pad(old.values, (0, 0, before, 0)), pad(new.values, (0, 0, after, 0))])

    def _pad_rest(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what follows the shared beginning, padded on the left, and the mask of all columns.

        They are int64 ``[rows, rest]`` and bool ``[rows, shared + rest]``.
        """
        shared = len(self._prefix)
        tokens, mask = left_pad([prompt[shared:] for prompt in prompts], self._pad_id)
        return tokens.to(self._last.device), pad(mask.bool(), (shared, 0), value=True).to(self._last.device)


class _Forward:
    """Calls the model and returns the logits of the next tokens."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._keys = last_logits(model, 1)
        self._attention = getattr(model.config, "_attn_implementation", None)

    def logits(self, tokens: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Append ``tokens``, int64 ``[rows, new]``, to ``cache``; return the last logits, float32 ``[rows, vocab]``.

        ``mask`` (bool ``[rows, cached + new]``) says which columns hold a token of the row.
        """
        # Counted over the columns that belong to the row: padding in the middle must not move the positions.
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self._model(
            input_ids=tokens,
            attention_mask=self._attention_mask(mask, tokens.shape[1]),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self._keys,
        )
        return output.logits[:, -1].float()

    def _attention_mask(self, mask: torch.Tensor, new: int) -> torch.Tensor:
        """Return what the model's attention takes: ``[rows, 1, new, columns]``, bool or added to the scores.

        Kernels that know no such mask get the plain one, int64 ``[rows, columns]``.
        """
        if self._attention not in ("sdpa", "eager"):
            return mask.long()
        visible = mask[:, None, None, :]
        if new > 1:
            columns = torch.arange(mask.shape[1], device=mask.device)
            own = columns[-new:, None]
            # Padding sees itself: attention over nothing would be NaN, and NaN survives being masked afterwards.
            visible = (visible & (columns < own)) | (columns == own)
        if self._attention == "sdpa":
            return visible
        dtype = self._model.dtype
        return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)


def last_logits(model: Any, count: int) -> dict[str, int]:
    """Return how ``model`` is asked for the logits of the last ``count`` positions alone, where it can be."""
    # The logits of a long prompt's other positions would fill the memory.
    can = "logits_to_keep" in inspect.signature(_inner_model(model).forward).parameters
    return {"logits_to_keep": count} if can else {}


def _inner_model(model: Any) -> Any:
    """Return the model inside an adapter, or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _common_prefix(prompts: Sequence[list[int]]) -> int:
    """Return how many tokens all prompts begin with.

    One of each is left over, for there must be something to decode.
    """
    # What the first and the last in alphabetical order share, all between them share.
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    return next((place for place in range(limit) if first[place] != last[place]), limit)
