"""An evaluation from its settings to its report."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.prompts import PARROT
from llamafactory_sekd.data.testsets import TestSet, load_test_set
from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.asking import documents_of, requests_of
from llamafactory_sekd.evaluation.comet import prepare_comet
from llamafactory_sekd.evaluation.costs import model_cost
from llamafactory_sekd.evaluation.evaluation_report import write_report
from llamafactory_sekd.evaluation.evaluation_results import Evaluated, build_results
from llamafactory_sekd.evaluation.evaluation_settings import OPTIONAL, Settings, System
from llamafactory_sekd.evaluation.metricx import prepare_metricx
from llamafactory_sekd.evaluation.scores import SURFACE_METRICS, surface_metric
from llamafactory_sekd.evaluation.segment_scores import SegmentScorer
from llamafactory_sekd.evaluation.system_fingerprint import locate
from llamafactory_sekd.evaluation.translate import collect_hypotheses, given_hypotheses
from llamafactory_sekd.evaluation.translator import Host
from llamafactory_sekd.evaluation.workspace import check_workspace, open_workspace
from llamafactory_sekd.fingerprints import Digests
from llamafactory_sekd.ranks import join_ranks
from llamafactory_sekd.reporting.metric_labels import metric_label


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` found: test sets, metrics that are models, and the metrics left out, with the reason."""

    test_sets: dict[Direction, TestSet]
    scorers: dict[str, SegmentScorer]
    skipped: dict[str, str]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each direction's test set."""
        return {str(direction): test_set.fingerprint for direction, test_set in self.test_sets.items()}


def prepare(settings: Settings, host: Host) -> Prepared:
    """Find out, before hours of work, whether all of it can be done; nothing is written.

    Raises :class:`EvaluationError` or :class:`DataError`, one line each.
    """
    test_sets = {d: load_test_set(settings.task, settings.task_dir, d, False) for d in settings.directions}
    for direction, test_set in test_sets.items():
        if not test_set.sources:
            raise EvaluationError(f"The test set {settings.task} {direction} in {settings.task_dir} is empty.")
    skipped = _without_references(settings, test_sets)
    check_workspace(settings, {str(direction): test_set.fingerprint for direction, test_set in test_sets.items()})

    for system in settings.systems:
        for direction, test_set in test_sets.items():
            if system.model is None:
                given_hypotheses(system, direction, test_set)
            elif system.examples is not None or system.document:
                requests_of(system, direction, test_set, settings.task_dir)
                documents_of(system, direction, test_set, settings.task_dir)
        if system.model is not None:
            _say_if_made_for_another_template(settings, system)
            for source in host.describe(system).sources:
                locate(source, system.name)

    scorers: dict[str, SegmentScorer] = {}
    for metric in settings.metrics:
        if metric not in skipped:
            try:
                scorer = _prepare_metric(settings, metric, test_sets)
            except EvaluationError as error:
                if metric not in settings.optional:
                    if metric.partition(":")[0] not in OPTIONAL:
                        raise
                    raise EvaluationError(f"{error} Or write `{metric}?` in `metrics` to go on without it.") from None
                skipped[metric] = str(error)
            else:
                scorers |= {metric: scorer} if scorer is not None else {}
    return Prepared(test_sets, scorers, skipped)


def _say_if_made_for_another_template(settings: Settings, system: System) -> None:
    template = (system.model or {}).get("template", settings.template)
    if system.prompt == PARROT and template != "parrot":
        logger.warning(
            "%s: the prompt is Parrot's, with its heading `### Input:`, and the template is %s: `prompt: plain`, or a "
            "prompt of your own, asks as chat data do.",
            system.name,
            template,
        )


def _without_references(settings: Settings, test_sets: dict[Direction, TestSet]) -> dict[str, str]:
    """Return the surface metrics with the reason, where a direction has sources alone."""
    missing = [str(direction) for direction, test_set in test_sets.items() if not test_set.references]
    reason = f"{', '.join(missing)} has no references ({settings.task_dir})."
    return {metric: reason for metric in settings.metrics if missing and metric in SURFACE_METRICS}


def _prepare_metric(settings: Settings, metric: str, test_sets: dict[Direction, TestSet]) -> SegmentScorer | None:
    """See that a metric can run; return its model where it is one."""
    if metric in SURFACE_METRICS:
        for direction in test_sets:
            surface_metric(metric, direction.target, settings.bleu_tokenizer)
        return None
    has_references = all(test_set.references for test_set in test_sets.values())
    location = settings.models[metric]
    if metric.partition(":")[0] == "metricx":
        scorer = prepare_metricx(location, Digests(), has_references, metric)
    else:
        scorer = prepare_comet(location, Digests(), has_references, metric)
    if scorer.needs_references and not has_references:
        raise EvaluationError(f"{location} needs references, and a direction of {settings.task} has none.")
    return scorer


def evaluate(settings: Settings, host: Host) -> dict[str, Any] | None:
    """Translate, score and report; return the contents of ``results.json`` (None on ranks other than the first).

    Under torchrun all ranks call this; the sentences are divided among them and the first rank scores.
    """
    with join_ranks() as ranks:
        prepared = ranks.from_first(prepare(settings, host) if ranks.is_first else None)
        for metric, reason in prepared.skipped.items() if ranks.is_first else ():
            logger.warning("%s is skipped: %s", metric_label(metric), reason)
        hold = open_workspace(settings, prepared.fingerprints) if ranks.is_first else nullcontext()
        with hold:
            hypotheses = collect_hypotheses(settings, prepared.test_sets, host, ranks)
            if not ranks.is_first:
                return None
            costs = {
                system.name: model_cost(host.describe(system).sources, system.name)
                for system in settings.systems
                if system.model is not None
            }
            data = Evaluated(settings, prepared.test_sets, hypotheses, prepared.scorers, prepared.skipped, costs)
            results = build_results(data)
            write_report(data, results)
    return results
