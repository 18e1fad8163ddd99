"""The texts behind the scores: test sets, translations, and their statistics per sentence, read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu.metrics.base import Metric

from llamafactory_sekd.data.testsets import TestSet, load_test_set
from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.scores import SURFACE_METRICS, segment_key, surface_metric
from llamafactory_sekd.evaluation.translation_store import read_hypotheses
from llamafactory_sekd.files import read_json
from llamafactory_sekd.study.report.cells import Cell, Study


class Texts:
    """Read what the study's results point to, on demand.

    Every method raises :class:`~llamafactory_sekd.errors.SekdError` for a file that is missing or does not fit.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._test_sets: dict[str, TestSet] = {}
        self._metrics: dict[tuple[str, str], Metric] = {}
        self._statistics: dict[tuple[str, str, str], np.ndarray] = {}

    def test_set(self, direction: str) -> TestSet:
        """Return the test set of a direction."""
        if direction not in self._test_sets:
            where = self._study.results["test_set"]
            self._test_sets[direction] = load_test_set(where["task"], where["task_dir"], direction)
        return self._test_sets[direction]

    def hypotheses(self, cell: Cell, direction: str) -> list[str]:
        """Return a cell's translations, one per sentence."""
        path = self._path(cell["hypotheses"], direction)
        return read_hypotheses(path, len(self.test_set(direction).sources))

    def metric(self, name: str, direction: str) -> Any:
        """Return sacrebleu's ``bleu`` or ``chrf`` that holds the references of the direction."""
        if (name, direction) not in self._metrics:
            test_set = self.test_set(direction)
            tokenizer = self._study.results["test_set"].get("bleu_tokenizer")
            metric = surface_metric(name, test_set.direction.target, tokenizer)
            metric._ref_cache = metric._cache_references([list(texts) for texts in test_set.reference_sets])
            self._metrics[name, direction] = metric
        return self._metrics[name, direction]

    def statistics(self, cell: Cell, direction: str, metric: str) -> np.ndarray:
        """Return sacrebleu's sufficient statistics, ``[sentences, counts]`` float64.

        For a metric that is a model these are the segment scores, ``[sentences, 1]``. What a corpus score is made of
        are their sums.
        """
        path = self._path(cell["hypotheses"], direction)
        key = (str(path), direction, metric)
        if key not in self._statistics:
            self._statistics[key] = np.asarray(self._extract(cell, direction, metric), dtype="float64")
        return self._statistics[key]

    def score(self, sums: np.ndarray, direction: str, metric: str, count: int) -> float:
        """Return the corpus score of statistics that were summed over ``count`` sentences."""
        if metric not in SURFACE_METRICS:
            return float(sums[0]) / count
        return float(self.metric(metric, direction)._compute_score_from_stats(sums.tolist()).score)

    def _extract(self, cell: Cell, direction: str, metric: str) -> Any:
        if metric in SURFACE_METRICS:
            return self.metric(metric, direction)._extract_corpus_statistics(self.hypotheses(cell, direction), None)
        path = self._path(cell["segment_scores"], segment_key(direction, metric))
        content = read_json(path)
        scores = content.get("scores") if isinstance(content, dict) else content
        count = len(self.test_set(direction).sources)
        if not isinstance(scores, list) or len(scores) != count:
            raise EvaluationError(f"The segment scores {path} are not {count} numbers: evaluate that cell again.")
        return [[score] for score in scores]

    def _path(self, paths: Any, direction: str) -> Path:
        if direction not in paths:
            raise EvaluationError(f"results.json names no file for {direction}: evaluate that cell again.")
        return self._study.root / paths[direction]
