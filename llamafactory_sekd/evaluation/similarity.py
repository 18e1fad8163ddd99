"""How like the teacher's translations a student's are (the paper's Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence

from llamafactory_sekd.evaluation.scores import BleuTokenizer, Score, score_corpus, surface_metric


def similarity(
    hypotheses: Sequence[str], teacher: Sequence[str], target_language: str, bleu_tokenizer: BleuTokenizer = None
) -> Score:
    """Return SacreBLEU (0 to 100) with the teacher's translations as the references."""
    return score_corpus(surface_metric("bleu", target_language, bleu_tokenizer), hypotheses, teacher)
