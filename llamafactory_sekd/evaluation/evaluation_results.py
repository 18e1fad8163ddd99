"""The second half of an evaluation: scores, significance, similarity and guards, as the contents of results.json."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.products import metrics_of_model
from llamafactory_sekd.data.prompts import PARROT
from llamafactory_sekd.data.testsets import TestSet
from llamafactory_sekd.evaluation.evaluation_settings import Settings, System
from llamafactory_sekd.evaluation.guards import by_part, inspect
from llamafactory_sekd.evaluation.scores import (
    SegmentScorer,
    Texts,
    mean,
    score_corpus,
    segment_file,
    similarity,
    surface_metric,
    tokenizer_note,
)
from llamafactory_sekd.evaluation.significance import (
    Paired,
    PairedTests,
    Statistics,
    comet_paired,
    corpus_statistics,
    holm,
    noticed,
    paired_signature,
    segment_statistics,
)
from llamafactory_sekd.evaluation.systems import Cost
from llamafactory_sekd.evaluation.translation_store import Hypotheses
from llamafactory_sekd.fingerprints import versions
from llamafactory_sekd.reporting.metric_labels import AVERAGE, metric_look


logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
_PACKAGES = ("llamafactory", "transformers", "torch", "sacrebleu", "unbabel-comet", "py3langid", "peft", "vllm")


@dataclass(frozen=True)
class Evaluated:
    """All that the results are made of.

    ``scorers`` are the metrics that are models, ``skipped`` those left out, with the reason, and ``costs`` those of
    the systems that are models.
    """

    settings: Settings
    test_sets: Mapping[Direction, TestSet]
    hypotheses: Mapping[str, Mapping[Direction, Hypotheses]]
    scorers: Mapping[str, SegmentScorer]
    skipped: Mapping[str, str]
    costs: Mapping[str, Cost | None] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics that can run."""
        return tuple(metric for metric in self.settings.metrics if metric not in self.skipped)


def build_results(data: Evaluated) -> dict[str, Any]:
    """Return the contents of ``results.json`` (its schema is described in docs/evaluation.md)."""
    segments = _segments(data)
    signatures: dict[str, dict[str, str]] = {str(direction): {} for direction in data.test_sets}
    systems = {name: _system(data, name, segments, signatures) for name in data.hypotheses}
    statistics = _statistics(data, segments)
    significance = _significance(data, segments, statistics, signatures)
    return {
        "schema_version": SCHEMA_VERSION,
        "task": data.settings.task,
        "directions": [str(direction) for direction in data.test_sets],
        "metrics": list(data.settings.metrics),
        "skipped": dict(data.skipped),
        "notes": _notes(data),
        "baseline": data.settings.baseline,
        "teacher": data.settings.teacher,
        "template": data.settings.template,
        "prompts": _prompts(data.settings),
        "decoding": data.settings.decoding.model_dump(),
        "test": data.settings.significance,
        "test_sets": {
            str(direction): {
                "sentences": len(test_set.sources),
                "fingerprint": test_set.fingerprint,
                "references": len(test_set.reference_sets),
                "origin": test_set.origin,
            }
            for direction, test_set in data.test_sets.items()
        },
        "systems": systems,
        "significance": significance,
        "noticed": noticed(systems, data.settings),
        **by_part(data.test_sets, statistics),
        "signatures": signatures,
        "fingerprints": {
            name: {str(direction): done.fingerprint for direction, done in by_direction.items()}
            for name, by_direction in data.hypotheses.items()
        },
        "interference": interfering(data.settings.systems, data.metrics),
        "versions": versions(_PACKAGES),
    }


# (metric, system, direction) to the scores of the sentences.
_Segments = dict[tuple[str, str, Direction], list[float]]


def _segments(data: Evaluated) -> _Segments:
    folder = data.settings.save_dir / "segment_scores"
    found: _Segments = {}
    for metric, scorer in data.scorers.items():
        places = {
            (name, direction): folder / name / segment_file(direction, metric)
            for name, by_direction in data.hypotheses.items()
            for direction in by_direction
        }
        scores = scorer.score(
            {
                place: Texts(
                    data.test_sets[direction].sources,
                    data.hypotheses[name][direction].lines,
                    data.test_sets[direction].references or None,
                )
                for (name, direction), place in places.items()
            }
        )
        found |= {(metric, *key): scores[place] for key, place in places.items()}
    return found


def _notes(data: Evaluated) -> list[str]:
    """Return what a reader of the scores has to know, each note once."""
    notes: list[str] = []
    for direction, test_set in data.test_sets.items():
        notes += [f"{direction}: {note}" for note in test_set.notes]
        if "bleu" in data.metrics and test_set.references:
            notes.append(tokenizer_note(direction.target, data.settings.bleu_tokenizer))
        if test_set.more_references and data.scorers:
            notes.append(f"{direction} has {len(test_set.reference_sets)} references; models read the first of them.")
    return [note for note in dict.fromkeys(notes) if note]


def _prompts(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return what each model was asked, where that is not the default."""
    found: dict[str, dict[str, Any]] = {}
    for system in settings.systems:
        model = system.model or {}
        entry: dict[str, Any] = {} if system.prompt == PARROT else {"prompt": system.prompt.text}
        entry |= {key: model[key] for key in ("default_system", "enable_thinking") if key in model}
        if (shown := system.examples) is not None:
            nearest = shown.choose == "nearest"
            entry["examples"] = {"origin": shown.origin, "number": shown.number, "nearest": nearest}
        entry |= {"document": system.document} if system.document else {}
        if entry:
            found[system.name] = entry
    return found


def _system(data: Evaluated, name: str, segments: _Segments, signatures: dict[str, dict[str, str]]) -> dict[str, Any]:
    scores: dict[str, dict[str, float | None]] = {}
    guards: dict[str, dict[str, float | None]] = {}
    generation: dict[str, dict[str, float]] = {}
    for direction, done in data.hypotheses[name].items():
        text, test_set = str(direction), data.test_sets[direction]
        scores[text] = {}
        for metric in data.settings.metrics:
            scores[text][metric], signature = _score(data, name, direction, metric, segments)
            if signature:
                signatures[text][metric] = signature
        ratio = _length_ratio(data, direction, done)
        known = (done.hit_limit, ratio, test_set.sources, done.thoughts, done.unaligned)
        found = inspect(done.lines, direction.target, *known)
        guards[text] = asdict(found)
        if done.seconds:
            seconds = done.seconds / done.ranks
            generation[text] = {"seconds": seconds, "sentences_per_second": len(done.lines) / seconds}
    average = {metric: mean([row[metric] for row in scores.values()]) for metric in data.settings.metrics}
    return {
        "scores": {**scores, AVERAGE: average},
        "similarity": _similarity(data, name, signatures),
        "guards": guards,
        "generation": generation,
        "cost": _cost(data, name, generation),
        "model": next((dict(one.model) for one in data.settings.systems if one.name == name and one.model), None),
    }


def _score(
    data: Evaluated, name: str, direction: Direction, metric: str, segments: _Segments
) -> tuple[float | None, str]:
    """Return a score and its signature; none of a metric that was left out."""
    if metric in data.skipped:
        return None, ""
    if metric in data.scorers:
        values = segments[metric, name, direction]
        return sum(values) / len(values), data.scorers[metric].signature
    lines = data.hypotheses[name][direction].lines
    score = score_corpus(_surface(data, metric, direction), lines, *data.test_sets[direction].reference_sets)
    return score.value, score.signature


def _surface(data: Evaluated, metric: str, direction: Direction) -> Any:
    return surface_metric(metric, direction.target, data.settings.bleu_tokenizer)


def _cost(data: Evaluated, name: str, generation: Mapping[str, Mapping[str, float]]) -> dict[str, float | None] | None:
    """Return what a model takes: parameters, bytes, sentences per second over all directions, memory of one GPU."""
    cost = data.costs.get(name)
    if cost is None:
        return None
    seconds = sum(entry["seconds"] for entry in generation.values())
    sentences = sum(len(done.lines) for done in data.hypotheses[name].values() if done.seconds)
    memory = [done.peak_memory for done in data.hypotheses[name].values() if done.peak_memory]
    return {
        **asdict(cost),
        "sentences_per_second": sentences / seconds if seconds else None,
        "peak_memory": max(memory, default=None),
    }


def _length_ratio(data: Evaluated, direction: Direction, done: Hypotheses) -> float | None:
    references = data.test_sets[direction].reference_sets
    if not references:
        return None
    score: Any = _surface(data, "bleu", direction).corpus_score(done.lines, [list(texts) for texts in references])
    return score.sys_len / score.ref_len if score.ref_len else 0.0


def _similarity(data: Evaluated, name: str, signatures: dict[str, dict[str, str]]) -> dict[str, float | None] | None:
    teacher = data.settings.teacher
    if teacher is None or name == teacher:
        return None
    result: dict[str, float | None] = {}
    for direction, done in data.hypotheses[name].items():
        reference = data.hypotheses[teacher][direction].lines
        score = similarity(done.lines, reference, direction.target, data.settings.bleu_tokenizer)
        result[str(direction)], signatures[str(direction)]["similarity"] = score.value, score.signature
    return {**result, AVERAGE: mean(list(result.values()))}


def _statistics(data: Evaluated, segments: _Segments) -> dict[str, dict[str, list[Statistics]]]:
    """Return ``{metric: {system: the statistics of each direction}}``."""

    def of(name: str, direction: Direction, metric: str) -> Statistics:
        if metric in data.scorers:
            return segment_statistics(segments[metric, name, direction])
        references = data.test_sets[direction].reference_sets
        lines = data.hypotheses[name][direction].lines
        return corpus_statistics(_surface(data, metric, direction), lines, *references)

    return {
        metric: {name: [of(name, direction, metric) for direction in data.test_sets] for name in data.hypotheses}
        for metric in data.metrics
    }


def _significance(
    data: Evaluated,
    segments: _Segments,
    statistics: Mapping[str, Mapping[str, list[Statistics]]],
    signatures: dict[str, dict[str, str]],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return ``{system: {direction or average: {metric: …}}}`` against the baseline, which has mean and interval."""
    baseline, directions = data.settings.baseline, tuple(data.test_sets)
    if baseline is None:
        return {}
    columns = [*map(str, directions), *([AVERAGE] if len(directions) > 1 else [])]
    result: dict[str, dict[str, dict[str, Any]]] = {name: {c: {} for c in columns} for name in data.hypotheses}
    for metric in data.metrics:
        others = ", ".join(name for name in data.hypotheses if name != baseline)
        logger.info("Significance of %s: %s against %s", metric_look(metric).label, others, baseline)
        tests = PairedTests(data.settings.significance, baseline, statistics[metric])
        for index, direction in enumerate(directions):
            if metric in data.scorers:
                found = _segment_tests(data, metric, direction, segments, tests.direction(index))
            else:
                signature = paired_signature(_scored(data, metric, direction), data.settings.significance)
                signatures[str(direction)][f"{metric}_paired"] = signature
                found = {name: asdict(test) for name, test in tests.direction(index).items()}
            for name, test in found.items():
                result[name][str(direction)][metric] = test
        if len(directions) > 1:
            for name, paired in tests.average().items():
                result[name][AVERAGE][metric] = asdict(paired)
    return result


def _scored(data: Evaluated, metric: str, direction: Direction) -> Any:
    """Return a metric that knows the number of references, which its signature tells."""
    scored = _surface(data, metric, direction)
    references = data.test_sets[direction].reference_sets
    scored.corpus_score(list(references[0][:1]), [list(texts[:1]) for texts in references])
    return scored


def _segment_tests(
    data: Evaluated, metric: str, direction: Direction, segments: _Segments, resampled: Mapping[str, Paired]
) -> dict[str, dict[str, float | None]]:
    """Compare as comet-compare does; the p of equal scores, which is none, counts as 1 for the correction."""
    baseline = str(data.settings.baseline)
    found = {
        name: _finite(asdict(comet_paired(segments[metric, name, direction], segments[metric, baseline, direction])))
        for name in data.hypotheses
        if name != baseline
    }
    corrected = holm({name: 1.0 if test["p"] is None else test["p"] for name, test in found.items()})
    kept = {
        name: {"ci": test.ci, **({} if name == baseline else {"low": test.low, "high": test.high})}
        for name, test in resampled.items()
    }
    tests = {name: {**test, "p_holm": corrected[name], **kept[name]} for name, test in found.items()}
    return {baseline: kept[baseline], **tests}


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: a test between equal scores has no p."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


# How the signature of a metric begins that chose a training text, and the metrics that resemble it: a metric likes
# what it chose.
_FAMILIES = {"chrF": ("chrf", "bleu"), "comet": ("comet",)}


def interfering(systems: Sequence[System], metrics: Sequence[str]) -> dict[str, list[str]]:
    """Return, for each system whose training text was chosen by a metric, the ``metrics`` of the same family."""
    found: dict[str, list[str]] = {}
    for system in systems:
        model = system.model or {}
        places = [str(model[key]) for key in ("adapter_name_or_path", "model_name_or_path") if model.get(key)]
        signatures = [text for place in places for text in metrics_of_model(Path(place)).values()]
        chose = " + ".join(signatures)
        own = [
            metric
            for metric in metrics
            if any(start in chose and any(part in metric for part in family) for start, family in _FAMILIES.items())
        ]
        if own:
            found[system.name] = own
    return found
