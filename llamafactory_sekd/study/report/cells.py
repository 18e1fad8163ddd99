"""What a study measured: cells, grouped by system and point of the matrix, their texts, and differences of groups."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu.metrics.base import Metric

from llamafactory_sekd.arguments import STAGE, DistillationArguments
from llamafactory_sekd.data.testsets import TestSet, load_test_set
from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.scores import SURFACE_METRICS, segment_key, surface_metric
from llamafactory_sekd.evaluation.significance import (
    SAMPLES,
    Statistics,
    bootstrap_p,
    bootstrap_weights,
    corpus_statistics,
    interval,
    is_significant,
    segment_statistics,
)
from llamafactory_sekd.evaluation.translation_store import read_hypotheses
from llamafactory_sekd.files import read_json
from llamafactory_sekd.reporting.metric_labels import AVERAGE


# Keys of the paper that have a letter.
SYMBOLS = {"kd_gamma": "Γ", "kd_topk": "K", "kd_beta": "β", "kd_lambda": "λ", "kd_temperature": "T"}
Cell = Mapping[str, Any]
Point = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Summary:
    """A mean over ``count`` seeds and the sample standard deviation, None for a single one."""

    mean: float
    sd: float | None
    count: int


def summarize(values: Iterable[float | None]) -> Summary | None:
    """Return the summary of the values that are known, None where there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Summary(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True, eq=False)
class Group:
    """A system at a point of the matrix. ``cells`` is by seed; an evaluated model has seed None."""

    system: str
    point: Point
    cells: dict[int | None, Cell]

    @property
    def config(self) -> Mapping[str, Any]:
        """The training YAML of the first seed; empty for a model that nobody trained."""
        return next(iter(self.cells.values())).get("config") or {}

    @property
    def objective(self) -> str | None:
        """The distillation objective, a mapping as text; None for another stage."""
        if self.config.get("stage") != STAGE:
            return None
        return str(self.config.get("kd_loss", DistillationArguments.kd_loss))

    @property
    def trained(self) -> bool:
        """Tell whether the group was trained, and not only evaluated."""
        return None not in self.cells

    def value(self, key: str) -> Any:
        """Return the group's value of a key of the matrix, None where the key has no effect on it."""
        return dict(self.point).get(key)

    def scores(self, column: str, metric: str) -> Summary | None:
        """Summarize a score over the seeds; ``column`` is a direction or ``average``."""
        return summarize(cell["scores"].get(column, {}).get(metric) for cell in self.cells.values())

    def similarity(self, column: str) -> Summary | None:
        """Summarize BLEU against the teacher's translations over the seeds."""
        return summarize((cell["similarity"] or {}).get(column) for cell in self.cells.values())

    def validation(self, metric: str) -> Summary | None:
        """Summarize a validation metric over the seeds."""
        return summarize((cell["validation"] or {}).get(metric) for cell in self.cells.values())

    def name(self, without: Sequence[str] = ()) -> str:
        """Return the system with the point's values, those of the keys ``without`` aside."""
        values = [f"{symbol(key)} = {shown(value)}" for key, value in self.point if key not in without]
        return ", ".join([self.system, *values])


@dataclass(frozen=True)
class Study:
    """All that was measured. ``models`` were evaluated only; ``missing`` names cells without scores."""

    results: Mapping[str, Any]
    root: Path
    keys: tuple[str, ...]
    groups: tuple[Group, ...]
    models: tuple[Group, ...]
    missing: tuple[str, ...]

    @property
    def spec(self) -> Mapping[str, Any]:
        """Return the study file as it ran."""
        return self.results["spec"]

    @property
    def directions(self) -> tuple[str, ...]:
        """Return the directions of the evaluation."""
        return tuple(self.results["directions"])

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the directions and, where there are several, the average."""
        return (*self.directions, AVERAGE) if len(self.directions) > 1 else self.directions

    @property
    def last_column(self) -> str:
        """Return what represents the entire test: the average, or the only direction."""
        return self.columns[-1]

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        """Return BLEU and COMET as the paper shows them, chrF2 in COMET's place where there is none."""
        groups = self.groups or self.models
        known = [
            one for one in self.results["metrics"] if any(group.scores(self.last_column, one) for group in groups)
        ]
        return tuple(metric for metric in known if metric != "chrf" or "comet" not in known)

    def keys_of(self, groups: Iterable[Group]) -> tuple[str, ...]:
        """Return the keys of the matrix that have an effect on any of the groups."""
        found = {key for group in groups for key, _ in group.point}
        return tuple(key for key in self.keys if key in found)

    @property
    def baseline(self) -> str | None:
        """Return the name of the system that differences are against."""
        return self.spec.get("baseline")

    @property
    def teacher(self) -> str | None:
        """Return the name of the model that similarity is measured to."""
        return self.spec.get("teacher")

    @property
    def systems(self) -> tuple[str, ...]:
        """The systems with a result, in the study's order, those that were evaluated only at the end."""
        return tuple(dict.fromkeys(group.system for group in (*self.groups, *self.models)))

    def baseline_of(
        self, group: Group, among: Sequence[Group] | None = None, free: Sequence[str] = ()
    ) -> Group | None:
        """Return the baseline at ``group``'s point: it must agree on every key that both have, ``free`` ones aside.

        None for the baseline itself, and where ``among`` (default: all groups) holds none or several that agree.
        """
        if self.baseline is None or group.system == self.baseline:
            return None
        point = {key: value for key, value in group.point if key not in free}
        fitting = [
            other
            for other in (*(self.groups if among is None else among), *self.models)
            if other.system == self.baseline and all(point.get(key, value) == value for key, value in other.point)
        ]
        return fitting[0] if len(fitting) == 1 else None


def read_study(results: Mapping[str, Any], root: Path) -> Study:
    """Group the cells of results.json, which is in ``root``.

    A cell counts once its scores are there, or without an evaluation once it is trained; the others are missing.
    """
    groups: dict[str, Group] = {}
    for cell in results["cells"]:
        if cell["scores"] is not None:
            point = tuple(cell["axes"].items())
            group = groups.setdefault(json.dumps([cell["system"], point]), Group(cell["system"], point, {}))
            group.cells[cell["seed"]] = cell
    models = [Group(model["name"], (), {None: model}) for model in results["models"] if model["scores"]]
    keys = tuple(results["spec"].get("matrix") or ())
    return Study(results, root, keys, tuple(groups.values()), tuple(models), tuple(_missing(results)))


def _missing(results: Mapping[str, Any]) -> Iterable[str]:
    for cell in results["cells"]:
        if cell["scores"] is None:
            name = Group(cell["system"], tuple(cell["axes"].items()), {}).name()
            yield f"{name}, seed {cell['seed']} ({'not evaluated' if cell['training'] else 'not trained'})"
    yield from (f"{model['name']} (not evaluated)" for model in results["models"] if not model["scores"])


def paired_cells(group: Group, baseline: Group) -> list[tuple[Cell, Cell]]:
    """Return the cells of both with the same seed; a model without seeds is the partner of every seed."""
    if not group.trained or not baseline.trained:
        return list(itertools.product(group.cells.values(), baseline.cells.values()))
    return [(cell, baseline.cells[seed]) for seed, cell in group.cells.items() if seed in baseline.cells]


def short_names(groups: Sequence[Group]) -> dict[Group, str]:
    """Name groups by what tells them apart: their systems or, of a single system, their points."""
    systems = {group.system for group in groups}
    if len(systems) == len(groups):
        return {group: group.system for group in groups}
    keys = {key for group in groups for key, _ in group.point}
    same = [key for key in keys if len({str(group.value(key)) for group in groups}) == 1]
    names = {group: group.name(without=same) for group in groups}
    if len(systems) > 1:
        return names
    return {group: name.removeprefix(f"{group.system}, ") for group, name in names.items()}


def symbol(key: str) -> str:
    """Return the paper's letter of a key, or the key."""
    return SYMBOLS.get(key, key)


def shown(value: Any) -> str:
    """Return a value of the matrix as a reader writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_number(value: Any) -> bool:
    """Tell whether a value is a number; a boolean is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Texts:
    """Test sets, translations and their statistics per sentence: what the study's results point to, read once.

    Every method raises :class:`~llamafactory_sekd.errors.SekdError` for a file that is missing or does not fit.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._test_sets: dict[str, TestSet] = {}
        self._metrics: dict[tuple[str, str], Metric] = {}
        self._statistics: dict[tuple[str, str, str], Statistics] = {}

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

    def statistics(self, cell: Cell, direction: str, metric: str) -> Statistics:
        """Return what a cell's corpus score is made of, sentence by sentence."""
        key = (str(self._path(cell["hypotheses"], direction)), direction, metric)
        if key not in self._statistics:
            self._statistics[key] = self._extract(cell, direction, metric)
        return self._statistics[key]

    def _extract(self, cell: Cell, direction: str, metric: str) -> Statistics:
        if metric in SURFACE_METRICS:
            return corpus_statistics(self.metric(metric, direction), self.hypotheses(cell, direction))
        path = self._path(cell["segment_scores"], segment_key(direction, metric))
        content = read_json(path)
        scores = content.get("scores") if isinstance(content, dict) else content
        count = len(self.test_set(direction).sources)
        if not isinstance(scores, list) or len(scores) != count:
            raise EvaluationError(f"The segment scores {path} are not {count} numbers: evaluate that cell again.")
        return segment_statistics(scores)

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
        # Of the same translations, sacrebleu's way of counting finds 1/1001.
        p = bootstrap_p(samples, abs(sum(seeds) / len(seeds))) if samples.any() else 1.0
        return Difference(seeds, *interval(samples), p)

    def _resampled(self, cell: Cell, direction: str, metric: str) -> np.ndarray:
        """Return a cell's corpus score on every resample, ``[samples]``."""
        key = (id(cell), direction, metric)
        if key not in self._scores:
            statistics = self._texts.statistics(cell, direction, metric)
            if direction not in self._weights:
                self._weights[direction] = bootstrap_weights(len(statistics.rows), self._samples)
            self._scores[key] = statistics.scores(self._weights[direction])
        return self._scores[key]
