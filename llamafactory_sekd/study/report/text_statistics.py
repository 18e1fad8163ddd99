"""What the translations say, sentence by sentence: significance, hard and easy sentences, rare and frequent words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu.metrics.base import Metric

from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.data.prompts import instruction
from llamafactory_sekd.data.readers import read_json_records
from llamafactory_sekd.data.testsets import TestSet, load_test_set
from llamafactory_sekd.errors import DataError, EvaluationError
from llamafactory_sekd.evaluation.scores import SURFACE_METRICS, segment_key, surface_metric
from llamafactory_sekd.evaluation.significance import SAMPLES, bootstrap_weights, interval, is_significant, p_value
from llamafactory_sekd.evaluation.translation_store import read_hypotheses
from llamafactory_sekd.files import read_json
from llamafactory_sekd.reporting.metric_labels import AVERAGE
from llamafactory_sekd.study.report.cells import Cell, Group, Study, Summary, paired_cells, summarize


class Texts:
    """Test sets, translations and their statistics per sentence: what the study's results point to, read once.

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


class PairedBootstrap:
    """Is a system better than the baseline, or lucky? A bootstrap over the sentences, with the seeds paired.

    One resample draws sentences with replacement. Every seed of both systems is scored on the same resample, seeds are
    paired with their like, and the difference is the mean over the pairs. With one seed this is sacrebleu's own paired
    bootstrap, to the last digit of p. Seeds are not resampled: how far they move a system is what the ± over seeds
    says.
    """

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
            if direction not in self._weights:
                self._weights[direction] = bootstrap_weights(len(statistics), self._samples)
            sums = self._weights[direction] @ statistics
            self._scores[key] = np.array([self._texts.score(row, direction, metric, len(statistics)) for row in sums])
        return self._scores[key]


def _p_value(samples: np.ndarray, observed: float) -> float:
    if not samples.any():  # the same translations, for which sacrebleu's way of counting finds 1/1001
        return 1.0
    sizes = np.abs(samples)
    return p_value(sizes - sizes.mean(), observed)


@dataclass(frozen=True)
class Halves:
    """BLEU (0 to 100) on both halves of every direction, averaged over directions, summarized over seeds."""

    hard: Summary | None
    easy: Summary | None


def judges(study: Study) -> tuple[Group, ...]:
    """Return whose sentence chrF2 makes the split: the teacher's where it was evaluated, else that of all systems.

    Never the baseline's: on sentences that were picked because it failed on them, a system looks bad by chance alone.
    """
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


# The smallest frequency of each bucket.
BUCKETS = {"0": 0, "1–4": 1, "5–19": 5, "20–99": 20, "100–999": 100, "1,000+": 1000}


@dataclass(frozen=True)
class Recall:
    """Per bucket: how many words of the references fall into it, and of them each group's share (0 to 1)."""

    words: tuple[int, ...]
    shares: tuple[tuple[Summary | None, ...], ...]


@dataclass(frozen=True)
class _Words:
    """A direction's references: per sentence its words with their counts, and how often training has each word."""

    split: Callable[[str], list[str]]
    references: Sequence[Counter[str]]
    training: Mapping[str, int]

    def hits(self, hypotheses: Sequence[str] | None) -> list[int]:
        """Return per bucket how many words of the references stand in the translations; None counts them all."""
        found = [0] * len(BUCKETS)
        for index, reference in enumerate(self.references):
            common = reference if hypotheses is None else reference & Counter(self.split(hypotheses[index]))
            for word, count in common.items():
                found[_bucket(self.training.get(word, 0))] += count
        return found


def word_recall(study: Study, texts: Texts, groups: Sequence[Group]) -> Recall:
    """Return the recall over all directions together, one row of shares per group.

    A word is a token of BLEU's tokenizer with a letter or a digit in it. It counts as often as it appears in both the
    reference and the translation of a sentence. Raises :class:`DataError` where the training text cannot be read.
    """
    records = _training_records(study.groups[0])
    words = {direction: _words(texts, records, direction) for direction in study.directions}
    totals = _summed(one.hits(None) for one in words.values())

    def shares(cell: Cell) -> list[float | None]:
        hits = _summed(one.hits(texts.hypotheses(cell, direction)) for direction, one in words.items())
        return [hit / total if total else None for hit, total in zip(hits, totals, strict=True)]

    by_group = [[shares(cell) for cell in group.cells.values()] for group in groups]
    return Recall(
        tuple(totals),
        tuple(tuple(summarize(seeds) for seeds in zip(*cells, strict=True)) for cells in by_group),
    )


def _training_records(group: Group) -> list[Mapping[str, Any]]:
    """Return the records that a group was trained on, in LLaMA-Factory's alpaca format, from its local files.

    Raises :class:`DataError` for a data set from elsewhere, in another format, or that is not there.
    """
    config = next(iter(group.cells.values()))["config"]
    folder = Path(config.get("dataset_dir") or "data")
    records: list[Mapping[str, Any]] = []
    for name in str(config.get("dataset") or "").split(","):
        try:
            entry = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[name.strip()]
            loaded = [record for _, record in read_json_records(folder / entry["file_name"])]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"The training text {name!r} cannot be read below {folder} ({error!r:.120}).") from None
        column = (entry.get("columns") or {}).get("response", "output")
        if not all(isinstance(record, dict) and isinstance(record.get(column), str) for record in loaded):
            raise DataError(f"The training text {name!r} has records without a text in {column!r}.")
        records += [{**record, "output": record[column]} for record in loaded]
    return records


def _words(texts: Texts, records: Sequence[Mapping[str, Any]], direction: str) -> _Words:
    tokenizer = texts.metric("bleu", direction).tokenizer

    def split(text: str) -> list[str]:
        return [token for token in tokenizer(text).split() if any(map(str.isalnum, token))]

    wanted = instruction(parse_direction(direction))
    own = [record["output"] for record in records if record.get("instruction") == wanted]
    training = Counter(word for target in own or [record["output"] for record in records] for word in split(target))
    references = [Counter(split(reference)) for reference in texts.test_set(direction).references]
    return _Words(split, references, training)


def _bucket(frequency: int) -> int:
    return max(index for index, low in enumerate(BUCKETS.values()) if frequency >= low)


def _summed(rows: Any) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]
