"""Is a system better than the baseline, or lucky, and do people notice? Paired tests, and a published relation.

The relation is that of a difference of scores and people's verdict. Kocmi, Zouhar, Federmann and Post, "Navigating the
Metrics Maze: Reconciling Score Magnitudes and Accuracies" (ACL 2024), held differences of metrics against human
judgments of 6,530 pairs of systems. Their curve (section 3.3) is

    share(x) = φ₁ / (1 + exp(-φ₂ · x))

of the pairs with a difference of x that people put in the same order. 50 % is a coin toss; each metric has a share,
φ₁, that it never passes. The figures are those of the authors' tool, https://github.com/kocmitom/MT-Thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import estimate_ci

from llamafactory_sekd.evaluation.evaluation_settings import Settings
from llamafactory_sekd.evaluation.scores import BleuTokenizer, model_name
from llamafactory_sekd.reporting.metric_labels import metric_look


Key = TypeVar("Key", bound=Hashable)

# sacrebleu's numbers for --paired-bs and --paired-ar.
SAMPLES = 1000
TRIALS = 10_000
SEED = 12345
ALPHA = 0.05
# What comet-compare takes: resamples, the share of the test set in each, the smallest difference that counts, the
# seed.
COMET_SPLITS = 300
COMET_SAMPLE_RATIO = 0.4
COMET_TIE = 0.001
COMET_SEED = 1


@dataclass(frozen=True)
class Paired:
    """A paired test: p against the baseline (None for the baseline itself), bootstrap mean, 95 % half-width.

    ``low`` and ``high`` are the 95 % interval of the difference to the baseline, ``p_holm`` is p after Holm's
    correction for the number of systems that are compared.
    """

    p: float | None
    mean: float
    ci: float
    low: float | None = None
    high: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class CometPaired:
    """comet-compare's result: the t-test's p and statistic; over resamples, both means and shares of wins and ties."""

    p: float
    t: float
    mean: float
    baseline_mean: float
    wins: float
    losses: float
    ties: float


@dataclass(frozen=True)
class Statistics:
    """What a system's corpus score is made of: ``rows`` ``[sentences, counts]``, whose sums ``score`` reads."""

    rows: np.ndarray
    score: Callable[[np.ndarray], float]

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """Return the score of each resample of ``weights`` ``[samples, sentences]``."""
        return np.array([self.score(sums) for sums in weights @ self.rows])


def corpus_statistics(metric: Metric, hypotheses: Sequence[str], *references: Sequence[str]) -> Statistics:
    """Return sacrebleu's sufficient statistics; without ``references``, against those that ``metric`` holds."""
    rows = metric._extract_corpus_statistics(list(hypotheses), [list(texts) for texts in references] or None)
    return Statistics(
        np.asarray(rows, dtype="float64"), lambda sums: float(metric._compute_score_from_stats(sums.tolist()).score)
    )


def segment_statistics(scores: Sequence[float]) -> Statistics:
    """Return the statistics of a metric that is the mean of its segment scores."""
    rows = np.stack([np.asarray(scores, dtype="float64"), np.ones(len(scores))], axis=1)
    return Statistics(rows, lambda sums: float(sums[0] / sums[1]))


def bootstrap_weights(sentences: int, samples: int = SAMPLES) -> np.ndarray:
    """Return how often each resample holds each sentence, ``[samples, sentences]``; drawn as sacrebleu draws."""
    drawn = np.random.default_rng(SEED).choice(sentences, size=(samples, sentences), replace=True)
    flat = drawn + sentences * np.arange(samples)[:, None]
    counts = np.bincount(flat.ravel(), minlength=samples * sentences)
    return counts.reshape(samples, sentences).astype("float64")


class PairedTests:
    """sacrebleu's paired tests of systems in several directions, and of the mean over the directions.

    ``kind`` is ``paired_bs`` (bootstrap) or ``paired_ar`` (approximate randomization). ``statistics`` maps the systems
    to the statistics of their directions, in one order.
    """

    def __init__(self, kind: str, baseline: str, statistics: Mapping[str, Sequence[Statistics]]) -> None:
        self._kind = kind
        self._baseline = baseline
        self._statistics = statistics
        sizes = [len(one.rows) for one in statistics[baseline]]
        self._weights = [bootstrap_weights(size) for size in sizes]
        self._signs = [_signs(size) for size in sizes] if kind == "paired_ar" else []
        self._resampled = {
            name: [one.scores(weights) for one, weights in zip(found, self._weights, strict=True)]
            for name, found in statistics.items()
        }

    def direction(self, index: int) -> dict[str, Paired]:
        """Return the tests in one direction, those of the baseline and of all systems."""
        return self._tests([index])

    def average(self) -> dict[str, Paired]:
        """Return the tests of the mean over all directions."""
        return self._tests(range(len(self._weights)))

    def _tests(self, directions: Sequence[int]) -> dict[str, Paired]:
        found = {}
        for name in self._statistics:
            mean, ci = estimate_ci(np.mean([self._resampled[name][index] for index in directions], axis=0))
            if name == self._baseline:
                found[name] = Paired(None, float(mean), float(ci))
            else:
                differences = self._differences(name, directions)
                p = self._p(name, directions, differences)
                found[name] = Paired(p, float(mean), float(ci), *interval(differences))
        corrected = holm({name: test.p for name, test in found.items() if test.p is not None})
        return {name: replace(test, p_holm=corrected.get(name)) for name, test in found.items()}

    def _differences(self, name: str, directions: Sequence[int]) -> np.ndarray:
        """Return the mean difference to the baseline on every resample, ``[samples]``."""
        pairs = [self._resampled[name][index] - self._resampled[self._baseline][index] for index in directions]
        return np.mean(pairs, axis=0)

    def _p(self, name: str, directions: Sequence[int], differences: np.ndarray) -> float:
        own, base = self._statistics[name], self._statistics[self._baseline]
        real = [
            own[index].score(own[index].rows.sum(0)) - base[index].score(base[index].rows.sum(0))
            for index in directions
        ]
        observed = abs(float(np.mean(real)))
        if self._kind == "paired_ar":
            return p_value(np.abs(np.mean([self._shuffled(name, index) for index in directions], axis=0)), observed)
        return bootstrap_p(differences, observed)

    def _shuffled(self, name: str, index: int) -> np.ndarray:
        """Return the differences of pseudo-systems, for which the translations of each sentence may change sides."""
        own, base, signs = self._statistics[name][index], self._statistics[self._baseline][index], self._signs[index]
        kept, swapped = signs @ own.rows, signs @ base.rows
        left, right = kept + base.rows.sum(0) - swapped, swapped + own.rows.sum(0) - kept
        return np.array([own.score(a) - own.score(b) for a, b in zip(left, right, strict=True)])


def _signs(sentences: int) -> np.ndarray:
    drawn = np.random.default_rng(SEED).integers(2, size=(TRIALS, sentences), dtype=bool)
    return (~drawn).astype("float32")


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of differences over resamples: their 2.5 % and 97.5 % quantiles."""
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


def p_value(samples: np.ndarray, observed: float) -> float:
    """Return the share of samples beyond what was observed, which counts as a sample itself."""
    return (int(np.sum(samples > observed)) + 1) / (len(samples) + 1)


def bootstrap_p(differences: np.ndarray, observed: float) -> float:
    """Return sacrebleu's p: the share of resamples whose size, less the mean size, passes the ``observed`` one."""
    sizes = np.abs(differences)
    return p_value(sizes - sizes.mean(), observed)


def paired_signature(metric: Metric, kind: str) -> str:
    """Return the signature of a test of sacrebleu's kind with a metric that has scored something."""
    signature = metric.get_signature()
    signature.update("seed", str(SEED))
    if kind == "paired_ar":
        signature.update("ar", TRIALS)
    else:
        signature.update("bs", SAMPLES)
    return str(signature)


def holm(values: Mapping[Key, float]) -> dict[Key, float]:
    """Return p of several comparisons after Holm's step-down correction: none is found by chance, with 1 - alpha."""
    corrected: dict[Key, float] = {}
    highest = 0.0
    for place, name in enumerate(sorted(values, key=lambda name: values[name])):
        highest = max(highest, min(1.0, (len(values) - place) * values[name]))
        corrected[name] = highest
    return corrected


def comet_paired(system: Sequence[float], baseline: Sequence[float]) -> CometPaired:
    """Compare two systems' segment scores as ``comet-compare`` does with its defaults.

    300 resamples of 40 % of the sentences, a difference below 0.001 being a tie, and a two-sided paired t-test;
    float32, as there. ``p`` is NaN where no sentence's score differs.
    """
    from scipy import stats

    scores = np.array([system, baseline], dtype="float32")
    count = scores.shape[1]
    rng = np.random.RandomState(COMET_SEED)
    picks = rng.choice(count, size=(max(int(count * COMET_SAMPLE_RATIO), 1), COMET_SPLITS), replace=True)
    means = scores[:, picks].mean(axis=1)
    delta = means[0] - means[1]
    test = stats.ttest_rel(scores[0], scores[1])
    return CometPaired(
        p=float(test.pvalue),
        t=float(test.statistic),
        mean=float(means[0].mean()),
        baseline_mean=float(means[1].mean()),
        wins=float((delta >= COMET_TIE).mean()),
        losses=float((delta <= -COMET_TIE).mean()),
        ties=float((np.abs(delta) < COMET_TIE).mean()),
    )


def is_significant(p: float | None, low: float | None, high: float | None) -> bool:
    """Tell whether a difference deserves a mark: the one rule of `eval`, `sekd study` and the demo.

    Two systems with the same score get p = 1/1001 from sacrebleu's bootstrap, and its p looks at one side: so the
    interval of the difference must be clear of zero as well.

    Args:
        p: the paired test's p, corrected by :func:`holm` for the systems that are compared; None where none ran.
        low: where the 95 % interval of the difference begins.
        high: where it ends.
    """
    return p is not None and p < ALPHA and low is not None and high is not None and not low <= 0 <= high


# φ₁ in percent and φ₂, of scores from 0 to 100: metrics of sacrebleu with its defaults, and models by name.
RELATIONS = {
    "bleu": (88.33333333333225, 0.9663926931178954),
    "chrf": (92.999999999972, 1.1142732157139852),
    "spbleu": (90.99999999998793, 0.8079046528617078),
}
MODEL_RELATIONS = {
    "wmt20-comet-da": (97.33333333332897, 0.7266990738678005),
    "wmt22-comet-da": (96.22374133884283, 2.8359194570556636),
    "wmt22-cometkiwi-da": (98.88141616584615, 2.719280643871758),
    "wmt23-cometkiwi-da-xxl": (96.23167242471065, 1.2826577343149304),
    "XCOMET-XL": (96.56738237041118, 1.4535595865214588),
    "XCOMET-XXL": (98.93432477039522, 1.1629533711748128),
}


def relations(
    metrics: Iterable[str], bleu_tokenizer: BleuTokenizer, models: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """Return the relation of each of the ``metrics`` that has one.

    Args:
        metrics: their keys.
        bleu_tokenizer: BLEU's, where the evaluation names one: the relation is that of the default.
        models: name or path of each metric that is a model.
    """
    known = {}
    for metric in metrics:
        if metric in models:
            known[metric] = MODEL_RELATIONS.get(model_name(models[metric]))
        elif metric != "bleu" or bleu_tokenizer is None:
            known[metric] = RELATIONS.get(metric)
    return {metric: relation for metric, relation in known.items() if relation is not None}


def share(relation: tuple[float, float], difference: float) -> float:
    """Return the share (0 to 1) of pairs with that ``difference`` (0 to 100) that people put in the same order."""
    limit, slope = relation
    return limit / (1 + math.exp(-slope * abs(difference))) / 100


def noticed(systems: Mapping[str, Mapping[str, Any]], settings: Settings) -> dict[str, dict[str, dict[str, float]]]:
    """Return ``{system: {direction or average: {metric: share}}}`` against the baseline, where a relation is known."""
    known = relations(settings.metrics, settings.bleu_tokenizer, settings.models)
    if settings.baseline is None or not known:
        return {}
    base = systems[settings.baseline]["scores"]
    return {
        name: {
            column: {
                metric: share(relation, (scores[metric] - base[column][metric]) * metric_look(metric).scale)
                for metric, relation in known.items()
                if scores[metric] is not None and base[column][metric] is not None
            }
            for column, scores in entry["scores"].items()
        }
        for name, entry in systems.items()
        if name != settings.baseline
    }
