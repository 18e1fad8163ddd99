"""Sampling from the student: how, with which random numbers, and with the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """How the student samples.

    Temperature 1 over the complete vocabulary draws from the distribution that the loss is an expectation over;
    anything else trains on prefixes that are more likely than the student itself finds them.

    Attributes:
        do_sample: False takes the most likely token.
        temperature, top_p, top_k: as in the host's generating arguments; ``top_k`` 0 keeps all tokens.
        max_new_tokens: longest sample.
        stop_ids: tokens that end a sample: the template's and the tokenizer's.
        pad_id: padding.
    """

    do_sample: bool
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int

    @property
    def is_plain(self) -> bool:
        """Tell whether samples are draws from the student's own distribution."""
        return self.do_sample and self.temperature == 1.0 and self.top_k <= 0 and self.top_p >= 1.0

    def is_truncated(self, sample: list[int]) -> bool:
        """Tell whether a sample hit the limit: it does not end with a stop token."""
        return sample[-1] not in self.stop_ids

    def warpers(self) -> LogitsProcessorList:
        """Return what turns logits into those that are sampled from."""
        processors = LogitsProcessorList()
        if self.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            processors.append(TopPLogitsWarper(self.top_p))
        return processors


class InverseTransform(LogitsProcessor):
    """Draws a token by one uniform number, which the row brings along.

    A generator that all rows share would tie a row's sample to the rows next to it. One number per row and token,
    drawn from a generator of the row's own, gives the same sample on any number of ranks, in any batch, and after a
    restart.

    Args:
        uniforms: ``[rows, new tokens]`` float64 in [0, 1).
        prompt_width: columns of ``input_ids`` that are not new.
    """

    def __init__(self, uniforms: torch.Tensor, prompt_width: int) -> None:
        self._uniforms = uniforms
        self._prompt_width = prompt_width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores ``[rows, vocab]`` that are 0 at the drawn token and -inf elsewhere."""
        drawn = draw(scores, self._uniforms[:, input_ids.shape[1] - self._prompt_width])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.unsqueeze(1), 0.0)  # type: ignore[return-value]


class RowDraws:
    """Draws the next token of each row by the row's own random numbers, whichever rows are decoded together.

    Args:
        sampling: how.
        seeds: of each row, by its place.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self._warpers = sampling.warpers()
        self._seeds = seeds
        self._count = sampling.max_new_tokens
        self._uniforms: dict[int, torch.Tensor] = {}

    def __call__(self, logits: torch.Tensor, places: list[int], numbers: list[int]) -> torch.Tensor:
        """Return tokens, int64 ``[rows]``, for ``logits [rows, vocab]``: the ``numbers``-th ones of these places."""
        for place, number in zip(places, numbers, strict=True):
            if number == 0:
                self._uniforms[place] = uniforms_of(self._seeds[place], self._count)
        chosen = torch.stack([self._uniforms[place][number] for place, number in zip(places, numbers, strict=True)])
        scores = self._warpers(torch.empty(0, dtype=torch.long), logits)
        return draw(scores, chosen.to(logits.device))


def draw(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return tokens, int64 ``[rows]``, distributed as ``softmax(scores)``.

    Args:
        scores: ``[rows, vocab]``, -inf allowed.
        uniforms: ``[rows]`` in [0, 1).
    """
    # float64: over 128k entries the rounding of a float32 sum exceeds the probability of most tokens.
    total = scores.double().softmax(-1).cumsum(-1)
    aim = uniforms.to(total).unsqueeze(1) * total[:, -1:]
    found = torch.searchsorted(total, aim, right=True).squeeze(1)
    last = (total < total[:, -1:]).sum(-1)  # rounding may lead behind the last token that has any probability
    return torch.minimum(found, last)


def uniforms_of(seed: int, count: int) -> torch.Tensor:
    """Return ``count`` numbers of a row's own, float64 in [0, 1)."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@contextmanager
def as_generator(model: Any) -> Iterator[None]:
    """Set the model up for generation and restore everything afterwards, also after an exception.

    In evaluation mode there is neither dropout nor gradient checkpointing. Modes are restored module by module,
    because frozen parts may have been in evaluation mode before.
    """
    modes = {module: module.training for module in model.modules()}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.generation_config
    # A checkpoint's own defaults fill whatever looks unset in a configuration that is passed along with the call.
    inner.generation_config = GenerationConfig()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        inner.generation_config = config
        for module, mode in modes.items():
            module.training = mode
