"""The second half of an evaluation: scores, significance, similarity and guards, as the contents of results.json."""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llamafactory_sekd import __version__
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.testsets import TestSet
from llamafactory_sekd.evaluation.comet import CometScorer
from llamafactory_sekd.evaluation.guards import inspect
from llamafactory_sekd.evaluation.interference import interfering
from llamafactory_sekd.evaluation.scores import mean, score_corpus, surface_metric
from llamafactory_sekd.evaluation.settings import Settings
from llamafactory_sekd.evaluation.significance import comet_paired, paired_bootstrap
from llamafactory_sekd.evaluation.similarity import similarity
from llamafactory_sekd.evaluation.store import Hypotheses


logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_PACKAGES = ("llamafactory", "transformers", "torch", "sacrebleu", "unbabel-comet", "py3langid", "peft", "vllm")


@dataclass(frozen=True)
class Evaluated:
    """All that the results are made of. ``comet`` is None where the metric was not asked for or is skipped."""

    settings: Settings
    test_sets: Mapping[Direction, TestSet]
    hypotheses: Mapping[str, Mapping[Direction, Hypotheses]]
    comet: CometScorer | None
    skipped: Mapping[str, str]


def build_results(data: Evaluated) -> dict[str, Any]:
    """Return the contents of ``results.json`` (its schema is described in docs/evaluation.md)."""
    segments = _comet_segments(data)
    signatures: dict[str, dict[str, str]] = {str(direction): {} for direction in data.test_sets}
    systems = {name: _system(data, name, segments, signatures) for name in data.hypotheses}
    significance = _significance(data, segments, signatures)
    return {
        "schema_version": SCHEMA_VERSION,
        "task": data.settings.task,
        "directions": [str(direction) for direction in data.test_sets],
        "metrics": list(data.settings.metrics),
        "skipped": dict(data.skipped),
        "baseline": data.settings.baseline,
        "teacher": data.settings.teacher,
        "template": data.settings.template,
        "decoding": asdict(data.settings.decoding),
        "test_sets": {
            str(direction): {"sentences": len(test_set.sources), "fingerprint": test_set.fingerprint}
            for direction, test_set in data.test_sets.items()
        },
        "systems": systems,
        "significance": significance,
        "signatures": signatures,
        "fingerprints": {
            name: {str(direction): done.fingerprint for direction, done in by_direction.items()}
            for name, by_direction in data.hypotheses.items()
        },
        "interference": interfering(data.settings.systems, data.settings.metrics),
        "versions": _versions(),
    }


_Segments = dict[tuple[str, Direction], list[float]]


def _comet_segments(data: Evaluated) -> _Segments:
    if data.comet is None:
        return {}
    folder = data.settings.save_dir / "segment_scores"
    places = {
        (name, direction): folder / name / f"{direction}.comet.json"
        for name, by_direction in data.hypotheses.items()
        for direction in by_direction
    }
    scores = data.comet.score(
        {
            place: (
                data.test_sets[direction].sources,
                data.hypotheses[name][direction].lines,
                data.test_sets[direction].references,
            )
            for (name, direction), place in places.items()
        }
    )
    return {key: scores[place] for key, place in places.items()}


def _system(data: Evaluated, name: str, segments: _Segments, signatures: dict[str, dict[str, str]]) -> dict[str, Any]:
    scores: dict[str, dict[str, float | None]] = {}
    guards: dict[str, dict[str, float | None]] = {}
    generation: dict[str, dict[str, float]] = {}
    for direction, done in data.hypotheses[name].items():
        text = str(direction)
        references = data.test_sets[direction].references
        scores[text] = {}
        for metric in data.settings.metrics:
            if metric == "comet":
                values = segments.get((name, direction))
                scores[text][metric] = sum(values) / len(values) if values is not None else None
                if data.comet is not None:
                    signatures[text][metric] = data.comet.signature
            else:
                score = score_corpus(surface_metric(metric, direction.target), done.lines, references)
                scores[text][metric], signatures[text][metric] = score.value, score.signature
        ratio = _length_ratio(direction, done.lines, references)
        guards[text] = asdict(inspect(done.lines, direction.target, done.hit_limit, ratio))
        if done.seconds:
            seconds = done.seconds / done.ranks
            generation[text] = {"seconds": seconds, "sentences_per_second": len(done.lines) / seconds}
    average = {metric: mean([row[metric] for row in scores.values()]) for metric in data.settings.metrics}
    return {
        "scores": {**scores, "average": average},
        "similarity": _similarity(data, name, signatures),
        "guards": guards,
        "generation": generation,
    }


def _length_ratio(direction: Direction, lines: Sequence[str], references: Sequence[str]) -> float:
    score: Any = surface_metric("bleu", direction.target).corpus_score(list(lines), [list(references)])
    return score.sys_len / score.ref_len if score.ref_len else 0.0


def _similarity(data: Evaluated, name: str, signatures: dict[str, dict[str, str]]) -> dict[str, float | None] | None:
    teacher = data.settings.teacher
    if teacher is None or name == teacher:
        return None
    result: dict[str, float | None] = {}
    for direction, done in data.hypotheses[name].items():
        score = similarity(done.lines, data.hypotheses[teacher][direction].lines, direction.target)
        result[str(direction)], signatures[str(direction)]["similarity"] = score.value, score.signature
    return {**result, "average": mean(list(result.values()))}


def _significance(
    data: Evaluated, segments: _Segments, signatures: dict[str, dict[str, str]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return ``{system: {direction: {metric: …}}}`` against the baseline, the baseline with its mean and interval."""
    baseline = data.settings.baseline
    if baseline is None:
        return {}
    result: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in data.hypotheses}
    for direction, test_set in data.test_sets.items():
        text = str(direction)
        logger.info("Significance %s: %d systems against %s", direction, len(data.hypotheses) - 1, baseline)
        lines = {name: by_direction[direction].lines for name, by_direction in data.hypotheses.items()}
        rows: dict[str, dict[str, Any]] = {name: {} for name in lines}
        for metric in data.settings.metrics:
            if metric == "comet":
                for name in lines:
                    if name != baseline and data.comet is not None:
                        paired = comet_paired(segments[name, direction], segments[baseline, direction])
                        rows[name][metric] = _finite(asdict(paired))
                continue
            others = {name: text for name, text in lines.items() if name != baseline}
            tests, signatures[text][f"{metric}_paired"] = paired_bootstrap(
                surface_metric(metric, direction.target), test_set.references, (baseline, lines[baseline]), others
            )
            for name, test in tests.items():
                rows[name][metric] = asdict(test)
        for name, row in rows.items():
            result[name][text] = row
    return result


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: a test between equal scores has no p."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _versions() -> dict[str, str]:
    versions = {"llamafactory_sekd": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
