"""Corpus scores of the surface: BLEU and chrF2, by the sacrebleu library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from llamafactory_sekd.data.languages import base_code
from llamafactory_sekd.errors import EvaluationError, one_line


@dataclass(frozen=True)
class Score:
    """A corpus score (0 to 100) and sacrebleu's signature of how it was made."""

    value: float
    signature: str


def surface_metric(name: str, target_language: str) -> Metric:
    """Return sacrebleu's ``bleu`` or ``chrf`` with its defaults, as the command ``sacrebleu -m`` makes them.

    BLEU's tokenizer follows the target language (``zh`` for Chinese, however its code is written). Raises
    :class:`EvaluationError` when that tokenizer needs a package that is not installed.
    """
    if name == "chrf":
        return CHRF()
    try:
        return BLEU(trg_lang=base_code(target_language))
    except (RuntimeError, ImportError) as error:
        raise EvaluationError(f"BLEU for the target language {target_language!r}: {one_line(str(error))}") from None


def score_corpus(metric: Metric, hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """Return a corpus score of sacrebleu and its signature."""
    score = metric.corpus_score(list(hypotheses), [list(references)])
    return Score(score.score, str(metric.get_signature()))


def mean(values: Sequence[float | None]) -> float | None:
    """Return the average over directions, or None where one is missing: an average over fewer misleads."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
