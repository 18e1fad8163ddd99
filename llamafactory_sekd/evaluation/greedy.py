"""Greedy decoding without the waste of fixed batches.

A sentence that has ended would cost as much as one that has not for as long as its batch lasts; here it leaves, and
the next one takes its place. And all prompts of a direction begin alike, so the beginning goes through the model
once and not once per sentence. Both rest on what transformers has: ``generate`` goes on from a cache that it is
given, and it counts positions from the attention mask, so the rows of a batch may be padded anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from llamafactory_sekd.evaluation.batching import batch_size
from llamafactory_sekd.evaluation.translator import BatchLimits


# The batch is repacked when this share of its sentences has ended. Repacking costs about as much as two steps.
_ENDED_SHARE = 0.25


def can_share_cache(model: Any) -> bool:
    """Tell whether every layer keeps the keys and values of all positions, which is what :func:`greedy_search` needs.

    Sliding windows, recurrent states, multimodal positions and older releases of transformers are left to
    ``generate``.
    """
    config = model.config
    if config.is_encoder_decoder or getattr(model, "_is_stateful", False) or config.get_text_config() is not config:
        return False
    try:
        layers = DynamicCache(config=config).layers
    except (TypeError, AttributeError):
        return False
    return all(type(layer).__name__ == "DynamicLayer" for layer in layers)


def greedy_search(
    model: Any,
    prompts: Sequence[list[int]],
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    limits: BatchLimits,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield groups of ``(index into prompts, new tokens)`` as they end, all of them in the end.

    The tokens are those that ``model.generate`` finds for each prompt alone, rounding aside, up to and including the
    stop token. ``model.generation_config`` must ask for greedy search.
    """
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    shared = _common_prefix(prompts)
    batch = _Batch(model, prompts, shared, torch.tensor(list(stop_ids), device=model.device), pad_id, max_new_tokens)
    waiting = 0
    while waiting < len(order) or batch.places:
        longest = max(len(prompts[index]) for index in [*batch.places, *order[waiting : waiting + 1]])
        size = batch_size(longest, new_tokens=max_new_tokens, beams=1, limits=limits)
        free = size - len(batch.places)
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

    ``places`` are their indices, ``made`` their new tokens. ``_tokens`` and ``_mask`` are int64 ``[rows, width]``;
    the cache holds all columns but the last, whose token has not gone through the model yet.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        shared: int,
        stops: torch.Tensor,
        pad_id: int,
        max_new_tokens: int,
    ) -> None:
        self.places: list[int] = []
        self.made: list[list[int]] = []
        self._model = model
        self._prompts = prompts
        self._stops = stops
        self._pad_id = pad_id
        self._max_new_tokens = max_new_tokens
        self._prefix = prompts[0][:shared]
        self._prefix_cache = self._run_prefix()
        self._tokens = torch.empty((0, 0), dtype=torch.long, device=model.device)
        self._mask = self._tokens
        self._cache: DynamicCache | None = None

    def admit(self, places: list[int]) -> None:
        """Take in new sentences and find their first tokens."""
        tokens, mask = self._pad_between([self._prompts[place] for place in places])
        cache = deepcopy(self._prefix_cache)
        if self._prefix:
            cache.batch_repeat_interleave(len(places))
        tokens = self._model.generate(input_ids=tokens, attention_mask=mask, past_key_values=cache, max_new_tokens=1)
        self.places += places
        self.made += tokens[:, -1:].tolist()
        self._join(tokens, pad(mask, (0, 1), value=1), cache)

    def decode(self) -> None:
        """Decode until so many sentences have ended, or one has come to its limit, that it is time to repack."""
        steps = self._max_new_tokens - max(map(len, self.made))
        criteria = StoppingCriteriaList([_EnoughEnded(self._stops, len(self.places))])
        width = self._tokens.shape[1]
        self._tokens = self._model.generate(
            input_ids=self._tokens,
            attention_mask=self._mask,
            past_key_values=self._cache,
            max_new_tokens=steps,
            stopping_criteria=criteria,
        )
        self._mask = pad(self._mask, (0, self._tokens.shape[1] - width), value=1)
        for row, new in zip(self.made, self._tokens[:, width:].tolist(), strict=True):
            row += new

    def release(self) -> list[tuple[int, list[int]]]:
        """Let the sentences go that have ended, and return them; columns that nobody needs any more go with them."""
        stops = set(self._stops.tolist())
        ended = [len(row) >= self._max_new_tokens or not stops.isdisjoint(row) for row in self.made]
        if not any(ended):
            return []
        gone = [(place, row) for place, row, out in zip(self.places, self.made, ended, strict=True) if out]
        staying = [number for number, out in enumerate(ended) if not out]
        self.places = [self.places[number] for number in staying]
        self.made = [self.made[number] for number in staying]
        rows = torch.tensor(staying, dtype=torch.long, device=self._tokens.device)
        columns = self._mask[rows].any(dim=0).nonzero().flatten()
        self._tokens, self._mask = self._tokens[rows][:, columns], self._mask[rows][:, columns]
        assert self._cache is not None
        for layer in self._cache.layers:
            layer.keys = layer.keys[rows][:, :, columns[:-1]]
            layer.values = layer.values[rows][:, :, columns[:-1]]
        return gone

    def _join(self, tokens: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> None:
        """Put new rows below the present ones; the narrower of the two is padded on the left."""
        if self._cache is None or not len(self._tokens):
            self._tokens, self._mask, self._cache = tokens, mask, cache
            return
        width = max(self._tokens.shape[1], tokens.shape[1])
        before, after = width - self._tokens.shape[1], width - tokens.shape[1]
        self._tokens = torch.cat(
            [pad(self._tokens, (before, 0), value=self._pad_id), pad(tokens, (after, 0), value=self._pad_id)]
        )
        self._mask = torch.cat([pad(self._mask, (before, 0)), pad(mask, (after, 0))])
        for old, new in zip(self._cache.layers, cache.layers, strict=True):
            old.keys = torch.cat([pad(old.keys, (0, 0, before, 0)), pad(new.keys, (0, 0, after, 0))])
            old.values = torch.cat([pad(old.values, (0, 0, before, 0)), pad(new.values, (0, 0, after, 0))])

    def _run_prefix(self) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        if self._prefix:
            self._model(
                input_ids=torch.tensor([self._prefix], device=self._model.device),
                past_key_values=cache,
                use_cache=True,
            )
        return cache

    def _pad_between(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and mask with the padding between the shared beginning and the rest of the prompts."""
        width, shared = max(map(len, prompts)), len(self._prefix)
        tokens = torch.full((len(prompts), width), self._pad_id, dtype=torch.long)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            start = width - len(prompt) + shared
            tokens[row, :shared], tokens[row, start:] = torch.tensor(prompt[:shared]), torch.tensor(prompt[shared:])
            mask[row, :shared], mask[row, start:] = 1, 1
        return tokens.to(self._model.device), mask.to(self._model.device)


class _EnoughEnded(StoppingCriteria):
    """Interrupts ``generate`` when so many sentences have ended that repacking the batch pays."""

    def __init__(self, stops: torch.Tensor, size: int) -> None:
        self._stops = stops
        self._ended = torch.zeros(size, dtype=torch.bool, device=stops.device)
        self._enough = max(1, int(size * _ENDED_SHARE))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self._ended |= torch.isin(input_ids[:, -1], self._stops)
        return self._ended | (self._ended.sum() >= self._enough)


def _common_prefix(prompts: Sequence[list[int]]) -> int:
    """Return how many tokens all prompts begin with; one of each is left over, for there must be something to
    decode.
    """
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    return next((place for place in range(limit) if first[place] != last[place]), limit)
