"""From candidates to what is written: chosen, looked at, and counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from llamafactory_sekd.data.checks import Findings, Pair, Problem
from llamafactory_sekd.data.languages import is_identifiable
from llamafactory_sekd.evaluation.segment_scores import SegmentScorer, Texts
from llamafactory_sekd.evaluation.translator import Translation
from llamafactory_sekd.translation import chrf
from llamafactory_sekd.translation.choosing import Utility, by_consensus, by_reference, chrf_utility
from llamafactory_sekd.translation.filters import find_problem
from llamafactory_sekd.translation.generated import Made
from llamafactory_sekd.translation.source_texts import Sentence


logger = logging.getLogger(__name__)

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
    used = [chrf.signature()] if choice.closest or choice.consensus == "chrf" else []
    used += [f"comet|{scorer.signature}"] if scorer is not None else []
    return " + ".join(used) or None


def select(
    sentences: Sequence[Sentence],
    candidates: Sequence[Sequence[Made]],
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
            order = [*by_consensus(number, sentence.source or sentence.message, texts, utility)]
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


def _looked_at(sentence: Sentence, made: Made, score: float | None, filters: Sequence[str]) -> Chosen:
    language = sentence.direction.target if sentence.direction is not None else None
    problem = find_problem(sentence.source, Translation(made.text, 0, made.hit_limit), language, filters)
    return Chosen(made.text, score, problem)


def _comet_utility(
    scorer: SegmentScorer, sentences: Sequence[Sentence], candidates: Sequence[Sequence[Made]], folder: Path
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

    def utility(number: int, source: str, different: Sequence[str], counts: Sequence[int]) -> list[float]:
        total = sum(counts)
        return [sum(s * c for s, c in zip(row, counts, strict=True)) / total for row in tables[number]]

    return utility


def _pairs(sentence: Sentence, found: Sequence[Made]) -> list[tuple[str, str, str]]:
    different = list(dict.fromkeys(one.text for one in found))
    source = sentence.source or sentence.message
    return [(source, hypothesis, reference) for hypothesis in different for reference in different]
