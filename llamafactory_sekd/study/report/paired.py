"""Is a system better than the baseline, or lucky? A paired bootstrap over the sentences, with the seeds paired.

One resample draws sentences with replacement. Every seed of both systems is scored on the same resample, seeds are
paired with their like, and the difference is the mean over the pairs. With one seed this is sacrebleu's own paired
bootstrap, to the last digit of p. Seeds are not resampled: how far they move a system is what the ± over seeds says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llamafactory_sekd.evaluation.significance import SAMPLES, bootstrap_weights, interval, is_significant, p_value
from llamafactory_sekd.reporting.metric_labels import AVERAGE
from llamafactory_sekd.study.report.cells import Cell, Group
from llamafactory_sekd.study.report.sentence_texts import Texts


@dataclass(frozen=True)
class Difference:
    """A system minus the baseline, on the metric's own scale.

    Attributes:
        seeds: the difference of each pair of seeds; ``value`` is their mean.
        low, high: the 95 % interval over resamples (2.5 % and 97.5 % quantiles).
        p: sacrebleu's: the share of resamples in which the size of the difference, less the mean size, passes the
            observed size.
        p_holm: p, corrected for the systems that are compared; None where that has not been done.
    """

    seeds: tuple[float, ...]
    low: float
    high: float
    p: float
    p_holm: float | None = None

    @property
    def value(self) -> float:
        """Return the mean difference over the pairs of seeds."""
        return sum(self.seeds) / len(self.seeds)

    @property
    def significant(self) -> bool:
        """Tell whether it deserves a mark."""
        return is_significant(self.p_holm, self.low, self.high)


def paired_cells(group: Group, baseline: Group) -> list[tuple[Cell, Cell]]:
    """Return the cells of both with the same seed; a model without seeds is the partner of every seed."""
    if not group.trained or not baseline.trained:
        left, right = list(group.cells.values()), list(baseline.cells.values())
        return [(one, other) for one in left for other in right]
    return [(cell, baseline.cells[seed]) for seed, cell in group.cells.items() if seed in baseline.cells]


class PairedBootstrap:
    """The bootstrap over ``samples`` resamples, the same ones for every system, seed and metric of a direction."""

    def __init__(self, texts: Texts, directions: Sequence[str], samples: int = SAMPLES) -> None:
        self._texts = texts
        self._directions = tuple(directions)
        self._samples = samples
        self._weights: dict[str, np.ndarray] = {}
        self._scores: dict[tuple[int, str, str], np.ndarray] = {}

    def compare(self, group: Group, baseline: Group, column: str, metric: str) -> Difference | None:
        """Return the difference in a direction or, with ``average``, in the mean over all of them.

        None where no seed is in both or a score is missing.
        """
        pairs = paired_cells(group, baseline)
        scores = [tuple(cell["scores"].get(column, {}).get(metric) for cell in pair) for pair in pairs]
        if not pairs or any(score is None for pair in scores for score in pair):
            return None
        directions = self._directions if column == AVERAGE else (column,)
        samples = np.mean(
            [
                self._resampled(one, d, metric) - self._resampled(other, d, metric)
                for d in directions
                for one, other in pairs
            ],
            axis=0,
        )
        seeds = tuple(one - other for one, other in scores)
        return Difference(seeds, *interval(samples), _p_value(samples, abs(sum(seeds) / len(seeds))))

    def _resampled(self, cell: Cell, direction: str, metric: str) -> np.ndarray:
        """Return a cell's corpus score on every resample, ``[samples]``."""
        key = (id(cell), direction, metric)
        if key not in self._scores:
            statistics = self._texts.statistics(cell, direction, metric)
            weights = self._weights_of(direction, len(statistics))
            sums = weights @ statistics
            self._scores[key] = np.array([self._texts.score(row, direction, metric, len(statistics)) for row in sums])
        return self._scores[key]

    def _weights_of(self, direction: str, sentences: int) -> np.ndarray:
        """Return how often each resample holds each sentence, ``[samples, sentences]``; drawn as sacrebleu draws."""
        if direction not in self._weights:
            self._weights[direction] = bootstrap_weights(sentences, self._samples)
        return self._weights[direction]


def _p_value(samples: np.ndarray, observed: float) -> float:
    if not samples.any():  # the same translations, for which sacrebleu's way of counting finds 1/1001
        return 1.0
    sizes = np.abs(samples)
    return p_value(sizes - sizes.mean(), observed)
