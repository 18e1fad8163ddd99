"""Is a system better than the baseline, or lucky? Paired tests over the same sentences."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import PairedTest


SAMPLES = 1000
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
    """A paired bootstrap: p against the baseline (None for the baseline itself), resampled mean, 95 % half-width."""

    p: float | None
    mean: float
    ci: float


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


def paired_bootstrap(
    metric: Metric, references: Sequence[str], baseline: tuple[str, Sequence[str]], others: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Paired], str]:
    """Run sacrebleu's own paired bootstrap of ``others`` against ``baseline`` (name and translations).

    Returns the result per system, the baseline included, and the signature (``…|bs:1000|seed:12345|…``).
    """
    # It tells about every step, on the level that other messages need.
    logging.getLogger("sacrebleu").setLevel(logging.WARNING)
    systems: list[tuple[str, Sequence[str]]] = [baseline, *others.items()]
    with _sacrebleu_seed(SEED):
        test = PairedTest(systems, {"metric": metric}, [list(references)], test_type="bs", n_samples=SAMPLES)
    signatures, results = test()
    (name,) = signatures
    paired: list[Any] = list(results[name])
    return {
        system: Paired(result.p_value, float(result.mean), float(result.ci))
        for (system, _), result in zip(systems, paired, strict=True)
    }, str(signatures[name])


@contextmanager
def _sacrebleu_seed(seed: int) -> Iterator[None]:
    """Hold sacrebleu to ``seed``, which it reads from the environment."""
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = before


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


def is_significant(p: float | None, difference: float) -> bool:
    """Tell whether to set the †.

    Two systems with the same score get p = 1/1001 from sacrebleu's bootstrap; no difference is never a significant
    one.
    """
    return p is not None and p < ALPHA and difference != 0
