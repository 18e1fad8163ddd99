"""An evaluation from its settings to its report: checked, translated, scored."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.prompts import PARROT
from llamafactory_sekd.data.testsets import TestSet, load_test_set
from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.evaluation_report import write_report
from llamafactory_sekd.evaluation.evaluation_results import Evaluated, build_results
from llamafactory_sekd.evaluation.evaluation_settings import OPTIONAL, Settings, System
from llamafactory_sekd.evaluation.metric_models import prepare_comet, prepare_metricx
from llamafactory_sekd.evaluation.scores import SURFACE_METRICS, SegmentScorer, surface_metric
from llamafactory_sekd.evaluation.systems import (
    BatchLimits,
    Document,
    Host,
    Request,
    Translation,
    Translator,
    documents_of,
    lines_fingerprint,
    locate,
    model_cost,
    requests_of,
    system_fingerprint,
)
from llamafactory_sekd.evaluation.translation_store import (
    Hypotheses,
    Record,
    Store,
    aligned,
    check_workspace,
    open_workspace,
    read_hypotheses,
    split_thought,
)
from llamafactory_sekd.files import write_lines
from llamafactory_sekd.fingerprints import Digests
from llamafactory_sekd.ranks import Ranks, join_ranks
from llamafactory_sekd.reporting.metric_labels import metric_look


logger = logging.getLogger(__name__)

TestSets = Mapping[Direction, TestSet]


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` found: test sets, metrics that are models, and the metrics left out, with the reason."""

    test_sets: dict[Direction, TestSet]
    scorers: dict[str, SegmentScorer]
    skipped: dict[str, str]


def prepare(settings: Settings, host: Host) -> Prepared:
    """Find out, before hours of work, whether all of it can be done; nothing is written.

    Raises :class:`EvaluationError` or :class:`DataError`, one line each.
    """
    test_sets = {d: load_test_set(settings.task, settings.task_dir, d, False) for d in settings.directions}
    for direction, test_set in test_sets.items():
        if not test_set.sources:
            raise EvaluationError(f"The test set {settings.task} {direction} in {settings.task_dir} is empty.")
    skipped = _without_references(settings, test_sets)
    check_workspace(settings, test_sets)

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
            logger.warning("%s is skipped: %s", metric_look(metric).label, reason)
        hold = open_workspace(settings, prepared.test_sets) if ranks.is_first else nullcontext()
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


@dataclass(frozen=True)
class Asked:
    """What a system is asked: a request for each sentence and, in their place, for ``documents`` where there are some.

    ``thought_words`` open and close the thoughts of its template.
    """

    requests: Sequence[Request]
    documents: Sequence[Document] = ()
    thought_words: tuple[str, str] | None = None


@dataclass(frozen=True)
class _Job:
    """One system in one direction that is not finished; ``pending`` are the sentences still to translate."""

    direction: Direction
    store: Store
    fingerprint: str
    asked: Asked
    pending: list[int]


def hypotheses_folder(settings: Settings, system: System) -> Path:
    """Return the folder of a system's translations."""
    return settings.save_dir / "hypotheses" / system.name


def given_hypotheses(system: System, direction: Direction, test_set: TestSet) -> list[str]:
    """Return the translations that a scored-only system brought; :class:`EvaluationError` when they do not fit."""
    assert system.hypotheses is not None
    return read_hypotheses(system.hypotheses / f"{direction}.txt", len(test_set.sources))


def collect_hypotheses(
    settings: Settings, test_sets: TestSets, host: Host, ranks: Ranks
) -> dict[str, dict[Direction, Hypotheses]]:
    """Return ``{system: {direction: translations}}``; on ranks other than the first, what the first knows, too.

    One model is loaded at a time, and none whose translations are all there.
    """
    digests = Digests(settings.save_dir / ".digests.json")
    collected: dict[str, dict[Direction, Hypotheses]] = {}
    for system in settings.systems:
        if system.model is None:
            collected[system.name] = _bring(settings, system, test_sets) if ranks.is_first else {}
            continue
        plan = _plan(settings, system, test_sets, host, digests) if ranks.is_first else None
        done, jobs = ranks.from_first(plan)
        memory = _translate(settings, system, jobs, host, ranks) if jobs else None
        if ranks.is_first:
            done |= {job.direction: job.store.finish(job.fingerprint, ranks.world, memory) for job in jobs}
            for job in jobs:
                _say_what_did_not_align(system, job, done[job.direction])
        collected[system.name] = {direction: done[direction] for direction in settings.directions if direction in done}
    return collected


def _bring(settings: Settings, system: System, test_sets: TestSets) -> dict[Direction, Hypotheses]:
    brought = {}
    for direction, test_set in test_sets.items():
        found = [split_thought(line) for line in given_hypotheses(system, direction, test_set)]
        lines = [text for text, _ in found]
        write_lines(hypotheses_folder(settings, system) / f"{direction}.txt", lines)
        brought[direction] = Hypotheses(lines, lines_fingerprint(lines), thoughts=[thought for _, thought in found])
    return brought


def _plan(
    settings: Settings, system: System, test_sets: TestSets, host: Host, digests: Digests
) -> tuple[dict[Direction, Hypotheses], list[_Job]]:
    """Return what is finished and what remains to be done."""
    description = host.describe(system)
    done: dict[Direction, Hypotheses] = {}
    jobs: list[_Job] = []
    for direction, test_set in test_sets.items():
        requests = requests_of(system, direction, test_set, settings.task_dir)
        documents = documents_of(system, direction, test_set, settings.task_dir)
        everything = [*(document.request for document in documents), *requests]
        fingerprint = system_fingerprint(system, description, settings.decoding, everything, digests, host.versions)
        folder = hypotheses_folder(settings, system)
        store = Store(folder, str(direction), len(requests), description.thought_words)
        finished = store.finished(fingerprint)
        if finished is not None:
            logger.info("%s %s: already translated and unchanged; skipping.", system.name, direction)
            done[direction] = finished
            continue
        if store.text_path.exists():
            logger.warning("%s %s: the model or its environment changed; translating again.", system.name, direction)
        pending = store.resume(fingerprint)
        if len(pending) < len(requests):
            kept = len(requests) - len(pending)
            logger.info("%s %s: continuing, %d of %d are done.", system.name, direction, kept, len(requests))
        asked = Asked(requests, documents, description.thought_words)
        jobs.append(_Job(direction, store, fingerprint, asked, pending))
    return done, jobs


def _translate(settings: Settings, system: System, jobs: list[_Job], host: Host, ranks: Ranks) -> int | None:
    """Translate with one system on all ranks and free its model; return the peak memory of this rank's GPU."""
    memory = None
    if any(job.pending for job in jobs):
        translator = host.load(system)
        for job in jobs:
            label = f"{system.name} {job.direction}"
            translate_pending(translator, job.asked, job.pending, job.store, job.fingerprint, settings, ranks, label)
        del translator
        memory = _free_memory()
    ranks.wait()
    return memory


def _say_what_did_not_align(system: System, job: _Job, done: Hypotheses) -> None:
    alone = done.unaligned or []
    documents = sum(any(alone[place] for place in document.places) for document in job.asked.documents if alone)
    if documents:
        logger.warning(
            "%s %s: %d of %d documents came back with another number of lines; their %d sentences were translated one "
            "by one. (`max_new_tokens` applies to a document; `document: 10` makes pieces of ten sentences.)",
            *(system.name, job.direction, documents, len(job.asked.documents), sum(alone)),
        )


def _free_memory() -> int | None:
    """Free what a model held, and return the most that was allocated since the last call; None without a GPU."""
    import torch

    gc.collect()
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


def translate_pending(
    translator: Translator,
    asked: Asked,
    pending: Sequence[int],
    store: Store,
    fingerprint: str,
    settings: Settings,
    ranks: Ranks,
    label: str,
) -> None:
    """Translate this rank's share of the sentences ``pending``; what is finished is kept at once.

    Shares are dealt out by length, so that all ranks get like work. The sentences of a document that comes back with
    another number of lines are translated one by one. ``label`` comes before the progress bar, which counts the
    sentences of this rank. The seconds that are recorded hold everything from here on, writing included.
    """
    mark = time.perf_counter()
    missing = set(pending)
    singles = [Document(asked.requests[index], (index,)) for index in pending]
    wanted = [one for one in asked.documents if missing.intersection(one.places)] if asked.documents else singles
    prompts = [translator.encode(one.request) for one in wanted]
    order = sorted(range(len(wanted)), key=lambda place: (-len(prompts[place]), place))
    mine = [(wanted[place], prompts[place]) for place in ranks.share(order)]
    part = store.open_part(fingerprint, ranks.rank)
    limits = BatchLimits(settings.batch_tokens, settings.batch_size)
    note = f" (rank 1 of {ranks.world})" if ranks.world > 1 else ""
    total = sum(len(missing.intersection(one.places)) for one, _ in mine)
    with tqdm(total=total, desc=f"{label}{note}", unit=" sentences", disable=not ranks.is_first) as progress:
        alone: dict[int, float] = {}  # sentences whose document does not fit, and the seconds that it took for them
        for again in (False, True):
            if again:
                mine = [
                    (Document(asked.requests[one], (one,)), translator.encode(asked.requests[one])) for one in alone
                ]
            for group in translator.translate([prompt for _, prompt in mine], limits):
                mark, started = time.perf_counter(), mark
                seconds = (mark - started) / len(group)
                finished = [
                    record
                    for place, made in group
                    for record in _records(mine[place][0], made, seconds, missing, asked, alone)
                ]
                part.append(finished)
                progress.update(len(finished))


def _records(
    document: Document, made: Translation, seconds: float, missing: set[int], asked: Asked, alone: dict[int, float]
) -> Iterator[Record]:
    """Yield what is finished; the sentences of a document that does not fit go into ``alone``."""
    first, count = document.places[0], len(document.places)
    if first in alone or not asked.documents:
        unaligned = True if first in alone else None
        yield Record(first, made.in_one_line(), seconds + alone.get(first, 0.0), unaligned=unaligned)
        return
    text, thought = split_thought(made.text, asked.thought_words)
    lines = aligned(text, count)
    for number, place in enumerate(document.places):
        if place in missing and lines is None:
            alone[place] = seconds / count
        elif place in missing and lines is not None:
            # The tokens of a document are counted once, with its first sentence.
            translation = Translation(lines[number], 0 if number else made.tokens, made.hit_limit)
            yield Record(place, translation, seconds / count, thought, unaligned=False)
