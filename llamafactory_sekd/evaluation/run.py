"""An evaluation from its settings to its report."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.testsets import TestSet, load_test_set
from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.comet import CometScorer, prepare_comet
from llamafactory_sekd.evaluation.evaluation_report import write_report
from llamafactory_sekd.evaluation.fingerprint import Digests, locate
from llamafactory_sekd.evaluation.results import Evaluated, build_results
from llamafactory_sekd.evaluation.scores import surface_metric
from llamafactory_sekd.evaluation.settings import Settings
from llamafactory_sekd.evaluation.translate import collect_hypotheses, given_hypotheses
from llamafactory_sekd.evaluation.translator import Host
from llamafactory_sekd.evaluation.workspace import check_workspace, open_workspace
from llamafactory_sekd.ranks import join_ranks


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` found: test sets, the COMET model, and the metrics left out, with the reason."""

    test_sets: dict[Direction, TestSet]
    comet: CometScorer | None
    skipped: dict[str, str]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each direction's test set."""
        return {str(direction): test_set.fingerprint for direction, test_set in self.test_sets.items()}


def prepare(settings: Settings, host: Host) -> Prepared:
    """Find out, before hours of work, whether all of it can be done; nothing is written.

    Raises :class:`EvaluationError` or :class:`DataError`, one line each.
    """
    test_sets = {d: load_test_set(settings.task, settings.task_dir, str(d)) for d in settings.directions}
    for direction, test_set in test_sets.items():
        if not test_set.sources:
            raise EvaluationError(f"The test set {settings.task} {direction} in {settings.task_dir} is empty.")
        for metric in settings.metrics:
            if metric != "comet":
                surface_metric(metric, direction.target)
    check_workspace(settings, {str(direction): test_set.fingerprint for direction, test_set in test_sets.items()})

    for system in settings.systems:
        if system.model is None:
            for direction, test_set in test_sets.items():
                given_hypotheses(system, direction, test_set)
        else:
            for source in host.describe(system).sources:
                locate(source, system.name)

    comet, skipped = _prepare_comet(settings)
    return Prepared(test_sets, comet, skipped)


def _prepare_comet(settings: Settings) -> tuple[CometScorer | None, dict[str, str]]:
    if "comet" not in settings.metrics:
        return None, {}
    try:
        return prepare_comet(settings.comet_model, Digests()), {}
    except EvaluationError as error:
        if not settings.comet_optional:
            raise
        logger.warning("COMET is skipped: %s", error)
        return None, {"comet": str(error)}


def evaluate(settings: Settings, host: Host) -> dict[str, Any] | None:
    """Translate, score and report; return the contents of ``results.json`` (None on ranks other than the first).

    Under torchrun all ranks call this; the sentences are divided among them and the first rank scores.
    """
    with join_ranks() as ranks:
        prepared = ranks.from_first(prepare(settings, host) if ranks.is_first else None)
        hold = open_workspace(settings, prepared.fingerprints) if ranks.is_first else nullcontext()
        with hold:
            hypotheses = collect_hypotheses(settings, prepared.test_sets, host, ranks)
            if not ranks.is_first:
                return None
            data = Evaluated(settings, prepared.test_sets, hypotheses, prepared.comet, prepared.skipped)
            results = build_results(data)
            write_report(data, results)
    return results
