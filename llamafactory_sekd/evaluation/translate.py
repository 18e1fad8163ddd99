"""The first half of an evaluation: every system's translations, new, continued, kept or brought along."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.testsets import TestSet
from llamafactory_sekd.evaluation.asking import documents_of, requests_of
from llamafactory_sekd.evaluation.evaluation_settings import Settings, System
from llamafactory_sekd.evaluation.generation import Asked, translate_pending
from llamafactory_sekd.evaluation.hypotheses import read_hypotheses, split_thought
from llamafactory_sekd.evaluation.system_fingerprint import lines_fingerprint, system_fingerprint
from llamafactory_sekd.evaluation.translation_store import Hypotheses, Store
from llamafactory_sekd.evaluation.translator import Host
from llamafactory_sekd.files import write_lines
from llamafactory_sekd.fingerprints import Digests
from llamafactory_sekd.ranks import Ranks


logger = logging.getLogger(__name__)

TestSets = Mapping[Direction, TestSet]


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
        memory = _run(settings, system, jobs, host, ranks) if jobs else None
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


def _run(settings: Settings, system: System, jobs: list[_Job], host: Host, ranks: Ranks) -> int | None:
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
