"""What goes wrong with machine translation that a corpus score hides, as shares of the sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamafactory_sekd.data.languages import is_identifiable, is_other_language


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
