"""Translate what is not translated yet."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from llamafactory_sekd.errors import one_line
from llamafactory_sekd.evaluation.asking import Document
from llamafactory_sekd.evaluation.evaluation_settings import Settings
from llamafactory_sekd.evaluation.hypotheses import aligned, split_thought
from llamafactory_sekd.evaluation.translation_store import Record, Store
from llamafactory_sekd.evaluation.translator import BatchLimits, Request, Translation, Translator
from llamafactory_sekd.ranks import Ranks


@dataclass(frozen=True)
class Asked:
    """What a system is asked: a request for each sentence and, in their place, for ``documents`` where there are some.

    ``thought_words`` open and close the thoughts of its template.
    """

    requests: Sequence[Request]
    documents: Sequence[Document] = ()
    thought_words: tuple[str, str] | None = None


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
    clock = _Clock()
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
        alone: dict[int, float] = {}
        for documents in _translated(translator, mine, limits):
            share = clock.lap() / len(documents)
            records, unaligned = _records(documents, missing, share, asked)
            alone |= unaligned
            part.append(records)
            progress.update(len(records))
        requests = [(index, asked.requests[index]) for index in alone]
        again = [(Document(request, (index,)), translator.encode(request)) for index, request in requests]
        for documents in _translated(translator, again, limits):
            share = clock.lap() / len(documents)
            found = [
                Record(one.places[0], _in_one_line(made), share + alone[one.places[0]], unaligned=True)
                for one, made in documents
            ]
            part.append(found)
            progress.update(len(found))


def _translated(
    translator: Translator, wanted: Sequence[tuple[Document, list[int]]], limits: BatchLimits
) -> Iterator[list[tuple[Document, Translation]]]:
    for group in translator.translate([prompt for _, prompt in wanted], limits):
        yield [(wanted[place][0], translation) for place, translation in group]


def _records(
    documents: Sequence[tuple[Document, Translation]], missing: set[int], seconds: float, asked: Asked
) -> tuple[list[Record], dict[int, float]]:
    """Return what is finished, and the sentences of documents that do not fit, with the seconds that they took."""
    records: list[Record] = []
    alone: dict[int, float] = {}
    for document, made in documents:
        if not asked.documents:
            records.append(Record(document.places[0], _in_one_line(made), seconds))
            continue
        text, thought = split_thought(made.text, asked.thought_words)
        lines = aligned(text, len(document.places))
        share = seconds / len(document.places)
        for number, place in enumerate(document.places):
            if place in missing and lines is None:
                alone[place] = share
            elif place in missing and lines is not None:
                # The tokens of a document are counted once, with its first sentence.
                translation = Translation(lines[number], 0 if number else made.tokens, made.hit_limit)
                records.append(Record(place, translation, share, thought, unaligned=False))
    return records, alone


def _in_one_line(made: Translation) -> Translation:
    return Translation(one_line(made.text), made.tokens, made.hit_limit)


class _Clock:
    """Gives the seconds since it was asked the last time."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()

    def lap(self) -> float:
        self._mark, started = time.perf_counter(), self._mark
        return self._mark - started
