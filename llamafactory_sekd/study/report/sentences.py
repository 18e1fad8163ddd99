"""BLEU of hard and of easy sentences, split by something that favors none of the systems.

A system must not be judged on sentences that were picked because it failed on them: it is bound to look bad there by
chance alone. So the split is the teacher's where it was evaluated, and else that of all systems together, each with
the same weight; never the baseline's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llamafactory_sekd.study.report.cells import Cell, Group, Study, Summary, summarize
from llamafactory_sekd.study.report.sentence_texts import Texts


@dataclass(frozen=True)
class Halves:
    """BLEU (0 to 100) on both halves of every direction, averaged over directions, summarized over seeds."""

    hard: Summary | None
    easy: Summary | None


def judges(study: Study) -> tuple[Group, ...]:
    """Return whose sentence chrF2 makes the split."""
    teacher = tuple(model for model in study.models if model.system == study.teacher)
    return teacher or study.groups


def hard_sentences(texts: Texts, judging: Sequence[Group], direction: str) -> np.ndarray:
    """Return which sentences are in the harder half, ``[sentences]`` bool; ties go by their place in the test set."""
    scores = np.mean([_sentence_chrf(texts, group, direction) for group in judging], axis=0)
    hard = np.zeros(len(scores), dtype=bool)
    hard[np.argsort(scores, kind="stable")[: len(scores) // 2]] = True
    return hard


def by_difficulty(study: Study, texts: Texts, groups: Sequence[Group]) -> list[Halves]:
    """Score the groups on both halves."""
    judging = judges(study)
    hard = {direction: hard_sentences(texts, judging, direction) for direction in study.directions}
    easy = {direction: ~chosen for direction, chosen in hard.items()}
    return [
        Halves(*(summarize(_bleu(texts, cell, half) for cell in group.cells.values()) for half in (hard, easy)))
        for group in groups
    ]


def _sentence_chrf(texts: Texts, group: Group, direction: str) -> np.ndarray:
    """Return the sentences' chrF2, averaged over the seeds."""
    return np.mean(
        [
            [texts.score(row, direction, "chrf", 1) for row in texts.statistics(cell, direction, "chrf")]
            for cell in group.cells.values()
        ],
        axis=0,
    )


def _bleu(texts: Texts, cell: Cell, chosen: dict[str, np.ndarray]) -> float:
    scores = []
    for direction, half in chosen.items():
        statistics = texts.statistics(cell, direction, "bleu")[half]
        scores.append(texts.score(statistics.sum(0), direction, "bleu", len(statistics)))
    return float(np.mean(scores))
