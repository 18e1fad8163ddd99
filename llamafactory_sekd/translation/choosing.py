"""Which of several translations is kept: the most likely, the one closest to all others, or to a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llamafactory_sekd.translation.chrf import pairwise


# How good each different candidate is on average, were each of the samples in turn the truth: the sentence's number,
# its source, the different candidates, and how often each was drawn, in; one number for each, out.
Utility = Callable[[int, str, Sequence[str], Sequence[int]], list[float]]


def chrf_utility(number: int, source: str, different: Sequence[str], counts: Sequence[int]) -> list[float]:
    """Return the mean chrF of each candidate against all samples, itself included."""
    weights = np.array(counts, dtype=np.float64)
    return list(map(float, pairwise(different, different) @ weights / weights.sum()))


def by_consensus(number: int, source: str, samples: Sequence[str], utility: Utility) -> list[tuple[int, float]]:
    """Return the different samples (by the place where each was first drawn) with their utility, the best first.

    This is minimum Bayes risk decoding. ``number`` is the sentence's, for utilities that were computed before.
    """
    first: dict[str, int] = {}
    counts: dict[str, int] = {}
    for place, text in enumerate(samples):
        first.setdefault(text, place)
        counts[text] = counts.get(text, 0) + 1
    values = utility(number, source, list(counts), list(counts.values()))
    return sorted(zip(first.values(), values, strict=True), key=lambda entry: (-entry[1], entry[0]))


def by_reference(samples: Sequence[str], reference: str) -> list[tuple[int, float]]:
    """Return the different samples with their chrF against the reference, the best first."""
    first = {text: place for place, text in reversed(list(enumerate(samples)))}
    values = pairwise(list(first), [reference])[:, 0]
    return sorted(
        ((place, float(value)) for place, value in zip(first.values(), values, strict=True)),
        key=lambda entry: (-entry[1], entry[0]),
    )
