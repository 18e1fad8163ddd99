"""From candidates to files: chosen, looked at, counted, and written as text or as a data set.

The most likely is chosen, the one closest to all others, or the one closest to a reference.
"""

from __future__ import annotations

import gzip
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llamafactory_sekd.data.checks import Findings, Pair, Problem
from llamafactory_sekd.data.languages import MIN_LETTERS, count_letters, is_identifiable, is_other_language
from llamafactory_sekd.data.products import (
    DATASET_INFO,
    Product,
    check_entries,
    merge_entries,
    read_manifest,
    write_product,
)
from llamafactory_sekd.errors import ArgumentError, DataError, suggestion
from llamafactory_sekd.evaluation.guards import has_loop
from llamafactory_sekd.evaluation.scores import SegmentScorer, Texts, chrf_signature, pairwise_chrf
from llamafactory_sekd.evaluation.systems import Translation
from llamafactory_sekd.files import locked, write_atomic
from llamafactory_sekd.translation.source_texts import Sentence


logger = logging.getLogger(__name__)

# How good each different candidate is on average, were each of the samples in turn the truth: the sentence's number,
# the different candidates, and how often each was drawn, in; one number for each, out.
Utility = Callable[[int, Sequence[str], Sequence[int]], list[float]]

# Sentences whose pairs of samples COMET scores before it writes them down.
_CHUNK = 50


@dataclass(frozen=True)
class Choice:
    """How one translation, or the ``n_best`` of them, are chosen among a sentence's candidates.

    ``consensus`` is ``chrf``, ``comet`` or None; ``closest`` prefers what is closest to the reference where there is
    one.
    """

    consensus: str | None = None
    closest: bool = False
    n_best: int = 1


@dataclass(frozen=True)
class Chosen:
    """A translation that was chosen, what the metric says of it, and what is wrong with it."""

    text: str
    score: float | None
    problem: Problem | None


@dataclass(frozen=True)
class Result:
    """A sentence and its translations, the best first; one that cannot be translated has an empty one."""

    sentence: Sentence
    chosen: list[Chosen]


def signature(choice: Choice, scorer: SegmentScorer | None) -> str | None:
    """Return the metric that chooses, with all that can change it; None where none does."""
    used = [chrf_signature()] if choice.closest or choice.consensus == "chrf" else []
    used += [f"comet|{scorer.signature}"] if scorer is not None else []
    return " + ".join(used) or None


def select(
    sentences: Sequence[Sentence],
    candidates: Sequence[Sequence[Translation]],
    choice: Choice,
    filters: Sequence[str],
    scorer: SegmentScorer | None,
    folder: Path,
) -> list[Result]:
    """Choose among the candidates of the sentences that were translated, which ``candidates`` has in their order."""
    utility: Utility = chrf_utility
    if scorer is not None:
        usable = [sentence for sentence in sentences if sentence.is_translated]
        utility = _comet_utility(scorer, usable, candidates, folder)
    if "language" in filters:
        _warn_of_unjudged([sentence for sentence in sentences if sentence.is_translated])
    made = iter(enumerate(candidates))
    results = []
    for sentence in tqdm(sentences, desc="Choosing", unit=" sentences", disable=len(sentences) < 1000):
        if sentence.problem is not None:
            results.append(Result(sentence, [Chosen("", None, sentence.problem)]))
            continue
        if sentence.keeps_reference:
            results.append(Result(sentence, [Chosen(sentence.reference or "", None, None)]))
            continue
        number, found = next(made)
        texts = [one.text for one in found]
        order: list[tuple[int, float | None]] = [(place, None) for place in range(len(found))]
        if choice.closest and sentence.reference is not None:
            order = [*by_reference(texts, sentence.reference)]
        elif choice.consensus is not None:
            order = [*by_consensus(number, texts, utility)]
        results.append(
            Result(sentence, [_looked_at(sentence, found[p], score, filters) for p, score in order[: choice.n_best]])
        )
    return results


def findings(results: Sequence[Result]) -> Findings:
    """Return every problem with the place of its sentence."""
    found = Findings()
    for result in results:
        for chosen in result.chosen:
            if chosen.problem is not None:
                found.add(chosen.problem, Pair("", "", result.sentence.file, result.sentence.line))
    return found


def _warn_of_unjudged(sentences: Sequence[Sentence]) -> None:
    """Say which sentences the filter ``language`` cannot judge."""
    unnamed = sum(sentence.direction is None for sentence in sentences)
    if unnamed:
        logger.warning(
            "The filter `language` does not judge %d of %d sentences, of no known target language: set `--to`.",
            unnamed,
            len(sentences),
        )
    targets = {sentence.direction.target for sentence in sentences if sentence.direction is not None}
    for code in sorted(targets):
        if not is_identifiable(code):
            logger.warning("The filter `language` does not know %s: it finds text in another script alone.", code)


def _looked_at(sentence: Sentence, made: Translation, score: float | None, filters: Sequence[str]) -> Chosen:
    language = sentence.direction.target if sentence.direction is not None else None
    problem = find_problem(sentence.source, made, language, filters)
    return Chosen(made.text, score, problem)


def _comet_utility(
    scorer: SegmentScorer, sentences: Sequence[Sentence], candidates: Sequence[Sequence[Translation]], folder: Path
) -> Utility:
    """Score every pair of different samples, in files of some sentences each, so that a killed run goes on."""
    entries: dict[Path, Texts] = {}
    for start in range(0, len(sentences), _CHUNK):
        pairs = [
            pair
            for number in range(start, min(start + _CHUNK, len(sentences)))
            for pair in _pairs(sentences[number], candidates[number])
        ]
        entries[folder / f"{start}.comet.json"] = Texts(
            [pair[0] for pair in pairs],
            [pair[1] for pair in pairs],
            [pair[2] for pair in pairs],
        )
    scores: Iterator[float] = (score for part in scorer.score(entries).values() for score in part)
    tables = []
    for found in candidates:
        size = len({one.text for one in found})
        tables.append([[next(scores) for _ in range(size)] for _ in range(size)])

    def utility(number: int, different: Sequence[str], counts: Sequence[int]) -> list[float]:
        total = sum(counts)
        return [sum(s * c for s, c in zip(row, counts, strict=True)) / total for row in tables[number]]

    return utility


def _pairs(sentence: Sentence, found: Sequence[Translation]) -> list[tuple[str, str, str]]:
    different = list(dict.fromkeys(one.text for one in found))
    source = sentence.source or sentence.message
    return [(source, hypothesis, reference) for hypothesis in different for reference in different]


def chrf_utility(number: int, different: Sequence[str], counts: Sequence[int]) -> list[float]:
    """Return the mean chrF of each candidate against all samples, itself included."""
    weights = np.array(counts, dtype=np.float64)
    return list(map(float, pairwise_chrf(different, different) @ weights / weights.sum()))


def by_consensus(number: int, samples: Sequence[str], utility: Utility) -> list[tuple[int, float]]:
    """Return the different samples (by the place where each was first drawn) with their utility, the best first.

    This is minimum Bayes risk decoding. ``number`` is the sentence's, for utilities that were computed before.
    """
    first: dict[str, int] = {}
    counts: dict[str, int] = {}
    for place, text in enumerate(samples):
        first.setdefault(text, place)
        counts[text] = counts.get(text, 0) + 1
    values = utility(number, list(counts), list(counts.values()))
    return sorted(zip(first.values(), values, strict=True), key=lambda entry: (-entry[1], entry[0]))


def by_reference(samples: Sequence[str], reference: str) -> list[tuple[int, float]]:
    """Return the different samples with their chrF against the reference, the best first."""
    first = {text: place for place, text in reversed(list(enumerate(samples)))}
    values = pairwise_chrf(list(first), [reference])[:, 0]
    return sorted(
        ((place, float(value)) for place, value in zip(first.values(), values, strict=True)),
        key=lambda entry: (-entry[1], entry[0]),
    )


FILTERS = {
    "empty": Problem.NO_TRANSLATION,
    "limit": Problem.HIT_LIMIT,
    "language": Problem.OTHER_LANGUAGE,
    "loop": Problem.LOOP,
    "length": Problem.LENGTH,
    "copy": Problem.COPY,
}
# From this many letters on one side, its length says something about the other's.
MAX_LENGTH_RATIO = 3.0


def parse_filters(text: str) -> tuple[str, ...]:
    """Read ``all``, ``none`` or a list such as ``empty,loop``; raises :class:`ArgumentError`."""
    if text in ("all", "none"):
        return tuple(FILTERS) if text == "all" else ()
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in FILTERS:
            raise ArgumentError(f"`--filters`: unknown filter {name!r}{suggestion(name, FILTERS)}")
    return tuple(name for name in FILTERS if name in names)


def find_problem(
    source: str | None, translation: Translation, language: str | None, filters: Sequence[str]
) -> Problem | None:
    """Return the first thing that is wrong with a translation.

    Args:
        source: the sentence; None where it is not known apart from its prompt.
        translation: what the model made of it.
        language: code of the language that was asked for; None where it is not known.
        filters: what to look for, names of :data:`FILTERS`.
    """
    text = translation.text
    found = {
        "empty": lambda: not text,
        "limit": lambda: translation.hit_limit,
        "language": lambda: language is not None and is_other_language(text, language),
        "loop": lambda: has_loop(text),
        "length": lambda: source is not None and _length_differs(source, text),
        "copy": lambda: source is not None and _is_copy(source, text),
    }
    return next((FILTERS[name] for name in FILTERS if name in filters and found[name]()), None)


def _length_differs(source: str, text: str) -> bool:
    sides = sorted((count_letters(source), count_letters(text)))
    return sides[1] >= MIN_LETTERS and sides[1] > MAX_LENGTH_RATIO * sides[0]


def _is_copy(source: str, text: str) -> bool:
    return count_letters(source) >= MIN_LETTERS and source.casefold().split() == text.casefold().split()


FORMS = (".txt", ".tsv", ".jsonl")


def form_of(path: Path | None) -> str:
    """Return the form that a file's name asks for: ``.tsv``, ``.jsonl``, or plain lines."""
    suffixes = [part for part in path.suffixes if part != ".gz"] if path is not None else []
    return suffixes[-1] if suffixes and suffixes[-1] in FORMS else ".txt"


def write_text(results: Sequence[Result], path: Path | None, stream: Any = None) -> None:
    """Write a line for each sentence, in the order of the input; ``path`` None is the ``stream``."""
    form = form_of(path)
    text = "".join(f"{_line(result, form)}\n" for result in results)
    data = text.encode("utf-8", "replace")
    if path is None:
        out = stream or sys.stdout.buffer
        out.write(data)
        out.flush()
        return
    write_atomic(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_dataset(
    results: Sequence[Result],
    name: str,
    folder: Path,
    request: dict[str, Any],
    source: dict[str, Any],
    overwrite: bool,
) -> dict[str, Any]:
    """Write ``folder/NAME.json`` and its manifest, and declare it in ``dataset_info.json``; return the manifest.

    Translations with a problem are left out, and the manifest has the lines of them.

    Raises:
        DataError: nothing is left, or the folder holds something else under that name.
    """
    records = [
        json.dumps({**result.sentence.record, "output": chosen.text}, ensure_ascii=False)
        for result in results
        for chosen in result.chosen
        if chosen.problem is None
    ]
    found = findings(results)
    if not records:
        raise DataError(f"Nothing is left for the data set {name!r}: {found.summary()}.")
    data = ("[\n" + ",\n".join(records) + "\n]\n").encode("utf-8", "replace")
    product = Product({f"{name}.json": (data, len(records))}, found, source, "that of the sources and of the model")
    entries = {name: {"file_name": f"{name}.json"}}
    path = folder / f"{name}.manifest.json"
    with locked(folder / ".sekd.lock"):
        check_entries(folder / DATASET_INFO, entries, overwrite)
        manifest = read_manifest(path)
        if manifest is not None and not overwrite and manifest.get("request") == request:
            overwrite = True  # of the same request: another version of a package may word a finding differently
        manifest = write_product(path, request, product, overwrite)
        merge_entries(folder / DATASET_INFO, entries, overwrite)
    return manifest


def _line(result: Result, form: str) -> str:
    best = result.chosen[0]
    sentence = result.sentence
    if form == ".txt":
        return best.text
    source = sentence.source if sentence.source is not None else sentence.message
    if form == ".tsv":
        return "\t".join(" ".join(text.replace("\t", " ").split("\n")) for text in (source, best.text))
    entry: dict[str, Any] = {"source": source, "translation": best.text}
    if sentence.direction is not None:
        entry["direction"] = str(sentence.direction)
    if sentence.reference is not None:
        entry["reference"] = sentence.reference
    if len(result.chosen) > 1 or best.score is not None:
        entry["candidates"] = [_candidate(chosen) for chosen in result.chosen]
    if best.problem is not None:
        entry["problem"] = best.problem.key
    return json.dumps(entry, ensure_ascii=False)


def _candidate(chosen: Chosen) -> dict[str, Any]:
    return {"text": chosen.text, **({"score": round(chosen.score, 4)} if chosen.score is not None else {})}
