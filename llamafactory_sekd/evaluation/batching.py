"""Which sentences are decoded together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llamafactory_sekd.evaluation.translator import BatchLimits


def batch_size(longest: int, *, new_tokens: int, beams: int, limits: BatchLimits) -> int:
    """Return how many sentences with prompts of up to ``longest`` tokens may be decoded together, at least one.

    As many as fit ``limits.tokens`` when every beam of every sentence runs to its limit, which bounds the key-value
    cache: sentences x ``beams`` x (``longest`` + ``new_tokens``); at most ``limits.sentences``.
    """
    size = max(1, limits.tokens // (beams * (longest + new_tokens)))
    return size if limits.sentences is None else min(size, limits.sentences)


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
