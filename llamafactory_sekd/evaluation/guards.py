"""What a corpus score hides: what goes wrong, as shares of the sentences, and the scores of parts of the test set."""

from __future__ import annotations

import re
import statistics as moments
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamafactory_sekd.data.languages import Direction, is_identifiable, is_other_language, script_of
from llamafactory_sekd.data.testsets import TestSet
from llamafactory_sekd.evaluation.scores import UNSPACED_SCRIPTS
from llamafactory_sekd.evaluation.significance import Statistics
from llamafactory_sekd.evaluation.systems import documents_in


# A phrase repeated this often in a row is a loop. Without a letter in it it must be more: "3 3 3 3" may be a score.
REPEATS = 4
REPEATS_WITHOUT_LETTERS = 8
# Repeated characters, where there are no spaces, must be this many: "zzzz" and "哈哈哈哈" are no loops.
MIN_LOOP_CHARACTERS = 24
MIN_LOOP_SIGNS = 32
# What belongs to a prompt or to a chat, and not to a translation.
_HEADING = re.compile(r"#{2,} ?(Instruction|Input|Response)\b|<\|?(im_start|im_end|assistant|user|endoftext)\|?>")
_HERE_IS = re.compile(r"\b(here is|here's|this is) (the|my|your|a) translation\b", re.IGNORECASE)
_TRANSLATION = (
    "translat|übersetz|traduc|traduz|tradução|překlad|preklad|prevod|prijevod|превод|перевод|переклад|tłumacz|fordít"
    "|käänn|tõlge|översätt|overs[æe]t|vertaal|vertaling|çevir|terjemah|bản dịch|μετάφρασ|תרגום|ترجم|अनुवाद|翻译|翻譯"
    "|翻訳|번역"
)
_LANGUAGE = (
    "german|english|czech|french|spanish|italian|portuguese|dutch|polish|russian|ukrainian|chinese|japanese|korean"
    "|arabic|deutsch|englisch|česky|čeština|français|español|中文|日本語"
)
# Before a colon that the source does not have: a word or two ("Answer: …", but not "He said: “…"), a language, a
# chatty start, a word for "translation".
_PREFACE = re.compile(
    r"^\W*(?:[^\W\d]+ ?){1,2}[:：](?!\d| ?[\"'“„«»‚‘])"
    rf"|^\W*(?:in |the )?(?:{_LANGUAGE})[*)]*[:：]"
    r"|^\W*(?:sure|certainly|of course|okay)\b[^.:]{0,80}:(?!\d)"
    rf"|^[^.!?:：]{{0,60}}(?:{_TRANSLATION})[^.!?:：]{{0,60}}[:：]",
    re.IGNORECASE,
)
_CHATTY = re.compile(r"^\W*(?:sure|certainly|of course|okay)!", re.IGNORECASE)
# Behind the end of a sentence, and before a colon that the source does not have.
_NOTE = re.compile(
    r"[.!?\"”“»)*。！？] *\W*(?:note|explanation|anmerkung|hinweis|erklärung|poznámka|vysvětlení|remarque|nota|"
    r"примечание|объяснение|注释?|注意|説明)\b[^.:]{0,30}[:：]",
    re.IGNORECASE,
)
_ARROW = re.compile(r"→|[-=]>")
# A shorter source may be a name, which its translation holds as it is.
_ECHO = 40
_QUOTES = {'"': '"', "“": "”", "„": "“”", "«": "»", "»": "«", "「": "」", "'": "'"}
_MARKS = frozenset("".join(_QUOTES) + "".join(_QUOTES.values()) + "‘’‚‹›")
# A row of one of these is a ruler or a gap to fill in, in a good translation too.
RULERS = frozenset("-=_*.~#─━═…·")


@dataclass(frozen=True)
class Guards:
    """Shares (0 to 1) of the sentences of one system in one direction.

    ``wrong_language`` is None where the identifier does not know the target language; ``hit_max_new_tokens`` where
    the translations are only scored. ``length_ratio`` is sacrebleu's: tokens of the output by tokens of the reference,
    None without references. ``extra_text`` is text that is no translation; ``thoughts`` are taken off before all else.
    ``unaligned`` are sentences whose document came back with another number of lines, None where no documents were
    asked for.
    """

    empty: float
    wrong_language: float | None
    repetition: float
    hit_max_new_tokens: float | None
    length_ratio: float | None
    extra_text: float | None = None
    thoughts: float | None = None
    unaligned: float | None = None


def inspect(
    lines: Sequence[str],
    language: str,
    hit_limit: Sequence[bool] | None,
    length_ratio: float | None,
    sources: Sequence[str] | None = None,
    thoughts: Sequence[bool] | None = None,
    unaligned: Sequence[bool] | None = None,
) -> Guards:
    """Look at the translations of one system into ``language``, a code of any kind."""
    count = len(lines)
    known = is_identifiable(language)
    return Guards(
        empty=sum(not line for line in lines) / count,
        wrong_language=sum(is_other_language(line, language) for line in lines) / count if known else None,
        repetition=sum(has_loop(line) for line in lines) / count,
        hit_max_new_tokens=sum(hit_limit) / count if hit_limit is not None else None,
        length_ratio=length_ratio,
        extra_text=sum(map(has_extra_text, lines, sources)) / count if sources is not None else None,
        thoughts=sum(thoughts) / count if thoughts is not None else None,
        unaligned=sum(unaligned) / count if unaligned is not None else None,
    )


def has_extra_text(line: str, source: str) -> bool:
    """Tell whether ``line`` has what no translation of ``source`` has.

    That is a heading of a prompt, a preface, a note behind the sentence, an arrow, quotation marks around it, or the
    source itself with more.
    """
    kinds = [_HEADING, _HERE_IS, _CHATTY, _ARROW]
    if not re.search("[:：]", source):
        kinds += [_PREFACE, _NOTE]
    if any(kind.search(line) and not kind.search(source) for kind in kinds):
        return True
    if len(source) >= _ECHO and len(line) > len(source) and source.casefold() in line.casefold():
        return True
    is_quoted = len(line) > 1 and line[-1] in _QUOTES.get(line[0], "")
    return is_quoted and not _MARKS.intersection(source)


def has_loop(line: str) -> bool:
    """Tell whether a phrase, or a string of characters, is repeated over and over."""
    folded = line.casefold()
    return _repeats(folded.split(), 0, 0) or _repeats(list(folded), MIN_LOOP_CHARACTERS, MIN_LOOP_SIGNS)


def _repeats(units: list[str], minimum: int, minimum_without_letters: int) -> bool:
    """Tell whether a phrase of any length is repeated without a gap, over ``minimum`` units or more in all."""
    # Compared as numbers and a period at a time: a long output has hundreds of periods and thousands of characters.
    numbers: dict[str, int] = {}
    line = np.array([numbers.setdefault(unit, len(numbers)) for unit in units])
    for period in range(1, len(units) // REPEATS + 1):
        end, run = _longest_run(line[period:] == line[:-period])
        if run < max((REPEATS - 1) * period, minimum - period):
            continue
        phrase = "".join(units[end : end + period])
        if any(character.isalpha() for character in phrase):
            return True
        enough = max((REPEATS_WITHOUT_LETTERS - 1) * period, minimum_without_letters - period)
        if run >= enough and not (len(set(phrase)) == 1 and phrase[0] in RULERS and minimum):
            return True
    return False


def _longest_run(same: NDArray[np.bool_]) -> tuple[int, int]:
    """Return where the longest row of true values of ``same`` ends (exclusive), and its length."""
    ends = np.flatnonzero(np.diff(np.concatenate(([False], same, [False])).astype(np.int8)))
    starts, stops = ends[::2], ends[1::2]
    if not len(starts):
        return 0, 0
    longest = int((stops - starts).argmax())
    return int(stops[longest]), int(stops[longest] - starts[longest])


# The longest source of each band, in words.
BANDS = {"1–10 words": 10, "11–20": 20, "21–30": 30, "31–50": 50}
REST = "51 or more"

# metric, then system, to the statistics of each direction.
_Statistics = Mapping[str, Mapping[str, Sequence[Statistics]]]
_Places = Sequence[int]


def by_part(test_sets: Mapping[Direction, TestSet], found: _Statistics) -> dict[str, dict[str, Any]]:
    """Return what results.json says of parts: ``by_domain``, ``by_document`` and ``by_length``, each by direction.

    A corpus score is made of sums over sentences, so a part is scored by its own sums, exactly as if it were a test
    set by itself.

    ``by_domain`` and ``by_length`` map a part to ``{"sentences": …, "scores": {system: {metric: …}}}``;
    ``by_document`` holds ``documents``, their number, and ``scores`` as mean and standard deviation over them.
    """
    domains: dict[str, Any] = {}
    documents: dict[str, Any] = {}
    lengths: dict[str, Any] = {}
    for index, (direction, test_set) in enumerate(test_sets.items()):
        if test_set.domains:
            domains[str(direction)] = _scored_parts(_places(test_set.domains), found, index)
        lengths[str(direction)] = _scored_parts(_in_order(_places(_bands(test_set.sources, direction))), found, index)
        named = [places for places in documents_in(test_set.documents) if test_set.documents[places[0]]]
        if len(named) > 1:
            documents[str(direction)] = {"documents": len(named), "scores": _over_documents(named, found, index)}
    return {"by_domain": domains, "by_document": documents, "by_length": lengths}


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        places.setdefault(name, []).append(index)
    return places


def _in_order(places: dict[str, list[int]]) -> dict[str, list[int]]:
    return {band: places[band] for band in (*BANDS, REST) if band in places}


def _bands(sources: Sequence[str], direction: Direction) -> list[str]:
    unspaced = script_of(direction.source) in UNSPACED_SCRIPTS
    lengths = [-(-len("".join(source.split())) // 2) if unspaced else len(source.split()) for source in sources]
    return [next((band for band, longest in BANDS.items() if length <= longest), REST) for length in lengths]


def _part_score(statistics: Statistics, places: _Places) -> float:
    return statistics.score(statistics.rows[list(places)].sum(0))


def _scored_parts(parts: Mapping[str, _Places], found: _Statistics, index: int) -> dict[str, dict[str, Any]]:
    names = list(next(iter(found.values()), {}))
    return {
        part: {
            "sentences": len(places),
            "scores": {
                name: {metric: _part_score(by_system[name][index], places) for metric, by_system in found.items()}
                for name in names
            },
        }
        for part, places in parts.items()
    }


def _over_documents(
    documents: Sequence[_Places], found: _Statistics, index: int
) -> dict[str, dict[str, dict[str, float]]]:
    result: dict[str, dict[str, dict[str, float]]] = {}
    for metric, by_system in found.items():
        for name, statistics in by_system.items():
            scores = [_part_score(statistics[index], places) for places in documents]
            entry = {"mean": moments.fmean(scores), "sd": moments.stdev(scores)}
            result.setdefault(name, {})[metric] = entry
    return result
