"""What can be wrong with a pair of sentences, and what is done about it.

A pair that cannot be learned from is left out; one that is only suspicious is kept; harmless white space is repaired.
All three are counted and reported with file and line.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from functools import cache
from itertools import compress
from operator import eq
from typing import Any, NamedTuple

import numpy as np

from llamafactory_sekd.data.languages import Direction, are_swapped, is_other_language


class Outcome(StrEnum):
    """What became of a pair with a finding."""

    LEFT_OUT = "left out"
    KEPT = "kept"
    REPAIRED = "repaired"


class Problem(Enum):
    """A finding about one pair: its key in the manifest, what became of the pair, and words for people."""

    def __init__(self, key: str, outcome: Outcome, words: str) -> None:
        self.key = key
        self.outcome = outcome
        self.words = words

    WRONG_ENCODING = ("wrong_encoding", Outcome.LEFT_OUT, "not valid UTF-8 (iconv converts other encodings)")
    CONTROL = (
        "control_character",
        Outcome.LEFT_OUT,
        "contains NUL or another control character (not text, or text in another encoding)",
    )
    BLANK = ("blank", Outcome.LEFT_OUT, "both sides are empty")
    EMPTY_SIDE = ("empty_side", Outcome.LEFT_OUT, "one side is empty")
    IDENTICAL = ("identical_sides", Outcome.KEPT, "the two sides are the same")
    REPLACEMENT = ("replacement_character", Outcome.KEPT, "contains U+FFFD, the trace of a wrong decoding")
    MOJIBAKE = ("mojibake", Outcome.KEPT, "looks like UTF-8 that was read as Latin-1 (ftfy repairs it)")
    MARKUP = ("markup", Outcome.KEPT, "contains tags or entities of HTML")
    INVISIBLE = (
        "invisible_character",
        Outcome.KEPT,
        "contains an invisible character (soft hyphen, zero-width space, direction override, private use)",
    )
    DECOMPOSED = ("decomposed", Outcome.KEPT, "has letters and their accents as separate characters (not NFC)")
    LINE_BREAK = ("line_break", Outcome.REPAIRED, "a line break inside a sentence became a space")
    OUTER_SPACE = ("outer_space", Outcome.REPAIRED, "white space around a sentence was removed")
    NEAR_DUPLICATE = (
        "near_duplicate",
        Outcome.LEFT_OUT,
        "nearly the same as a pair that is held out for validation or test",
    )
    QUOTED = (
        "quotation_marks",
        Outcome.KEPT,
        "has doubled quotation marks inside of quotation marks, or all pairs are in quotation marks, as a spreadsheet "
        "writes them (--quoted reads them so)",
    )
    VERY_LONG = (
        "very_long",
        Outcome.KEPT,
        "has a side of more than 5,000 characters, which is no sentence (a line break may be missing)",
    )
    SWAPPED = (
        "swapped_sides",
        Outcome.KEPT,
        "of the sampled ones: the source is in the target's language and the other way round (exchange the two)",
    )
    UNEXPECTED_LANGUAGE = (
        "unexpected_language",
        Outcome.KEPT,
        "of the sampled ones: a side is in another language (`sekd data check` looks at all pairs)",
    )
    # Of text that a model made.
    NO_TRANSLATION = ("no_translation", Outcome.LEFT_OUT, "the translation is empty")
    HIT_LIMIT = ("hit_limit", Outcome.LEFT_OUT, "the translation reached the limit of tokens without an end")
    OTHER_LANGUAGE = ("other_language", Outcome.LEFT_OUT, "the translation is in another language")
    LOOP = ("loop", Outcome.LEFT_OUT, "the translation repeats itself")
    LENGTH = ("length", Outcome.LEFT_OUT, "one side is more than three times as long as the other")
    COPY = ("copy", Outcome.LEFT_OUT, "the translation is the source")


# Bytes that are not UTF-8 arrive as lone surrogates ("surrogateescape"), as do broken escapes in JSON.
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# Everything that some tool takes for the end of a line (str.splitlines): a sentence must stay on one.
_LINE_BREAK = re.compile("\r\n|[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")
# Control characters that are neither white space nor one of the line breaks above.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")


# What is suspicious but kept. Joiners and direction marks are left out: some scripts need them.
_KEPT = {
    Problem.REPLACEMENT: re.compile("\ufffd"),
    Problem.MOJIBAKE: re.compile("[\u00c2\u00c3][\x80-\xbf]|\u00e2\u20ac"),
    Problem.MARKUP: re.compile(r"</?[A-Za-z][^<>]*>|&(?:[A-Za-z]{2,8}|#\d{1,6}|#x[0-9A-Fa-f]{1,5});"),
    Problem.INVISIBLE: re.compile("[\u00ad\u200b\u202a-\u202e\u2060\u2066-\u2069\ufeff\ue000-\uf8ff]"),
}
# Accents, jamo and voice marks that follow their letter.
_COMBINING = re.compile("[\u0300-\u036f\u1100-\u11ff\u3099\u309a]")
_VERY_LONG = 5000  # characters of a side
_SAMPLED = 50  # pairs of a block whose languages are looked at
# From which number, and share of those that were looked at, other languages are more than the identifier's mistakes.
_SEVERAL, _SHARE = 3, 0.1
# What a character may mean: nothing (0), a space or control at one of the ends, or what `_TO_LOOK_AT` names.
_NOT_AT_ENDS, _SUSPECT = 1, 2
# Characters without which none of the patterns above matches, and which most texts do not have.
_TO_LOOK_AT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad&<\u00c2\u00c3\u0300-\u036f\u1100-\u11ff\u200b\u2028-\u202e\u2060"
    "\u2066-\u2069\u20ac\u3099\u309a\ud800-\uf8ff\ufeff\ufffd]"
)
_AT_ONCE = 1000  # pairs of a piece of a block
# So many lines of a finding are kept: a crawled corpus can have millions.
KEPT_LINES = 1000


class Pair(NamedTuple):
    """A source sentence, its translation, and where they were read (``line`` counts from 1)."""

    source: str
    target: str
    file: str
    line: int

    @property
    def reversed(self) -> Pair:
        """Return the pair for the opposite direction."""
        return Pair(self.target, self.source, self.file, self.line)


@dataclass(frozen=True)
class Block(Sequence[Pair]):
    """Pairs of one file, each side by itself, so that thousands are looked at without a step of Python for each.

    Where ``encoding`` is Latin-1, the characters of the sides are the bytes of UTF-8, which are read faster.
    """

    sources: list[str]
    targets: list[str]
    file: str
    lines: Sequence[int]
    encoding: str = "utf-8"

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Block:
        """Return one or more pairs of one file as a block."""
        sources, targets, files, lines = zip(*pairs, strict=True)
        return cls(list(sources), list(targets), files[0], lines)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return replace(self, sources=self.sources[place], targets=self.targets[place], lines=self.lines[place])
        source, target = self.sources[place], self.targets[place]
        if self.encoding != "utf-8":
            source, target = (s.encode(self.encoding).decode("utf-8", "surrogateescape") for s in (source, target))
        return Pair(source, target, self.file, self.lines[place])

    def pieces(self) -> Iterator[Block]:
        """Give blocks of which what is computed fits in a processor's cache."""
        return (self[at : at + _AT_ONCE] for at in range(0, len(self), _AT_ONCE))

    def only(self, wanted: Sequence[bool]) -> Block:
        """Return the pairs that are wanted."""
        if all(wanted):
            return self
        sources, targets = list(compress(self.sources, wanted)), list(compress(self.targets, wanted))
        return replace(self, sources=sources, targets=targets, lines=list(compress(self.lines, wanted)))


@dataclass
class Findings:
    """The findings of one corpus: how many, and the first :data:`KEPT_LINES` of each as (problem, file, line)."""

    items: list[tuple[Problem, str, int]] = field(default_factory=list)
    counts: Counter[tuple[Problem, str]] = field(default_factory=Counter)

    def add(self, problem: Problem, pair: Pair) -> None:
        """Record a problem of a pair."""
        kind = problem, pair.file
        self.counts[kind] += 1
        if self.counts[kind] <= KEPT_LINES:
            self.items.append((problem, pair.file, pair.line))

    def summary(self) -> str:
        """Return the number of pairs with each problem, as one line."""
        found: Counter[Problem] = Counter()
        for (problem, _), count in self.counts.items():
            found[problem] += count
        return ", ".join(f"{found[problem]} times: {problem.words}" for problem in Problem if found[problem])

    def as_json(self) -> list[dict[str, Any]]:
        """Return one entry per problem and file with its first line numbers, for the manifest."""
        lines: dict[tuple[Problem, str], list[int]] = {}
        for problem, file, line in self.items:
            lines.setdefault((problem, file), []).append(line)
        return [
            {
                "problem": problem.key,
                "words": problem.words,
                "outcome": problem.outcome.value,
                "file": file,
                "count": self.counts[problem, file],
                "lines": numbers,
            }
            for (problem, file), numbers in lines.items()
        ]

    @classmethod
    def from_json(cls, entries: list[dict[str, Any]]) -> Findings:
        """Return what :meth:`as_json` wrote down."""
        problems = {problem.key: problem for problem in Problem}
        found = cls()
        for entry in entries:
            problem, file = problems[entry["problem"]], entry["file"]
            found.items += [(problem, file, line) for line in entry["lines"]]
            found.counts[problem, file] = entry["count"]
        return found


def is_empty(text: str) -> bool:
    """Tell whether ``text`` shows nothing: white space, control and zero-width characters only."""
    return all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text)


def clean_pairs(pairs: Iterable[Pair], findings: Findings) -> list[Pair]:
    """Return the usable pairs, repaired; whatever was found goes to ``findings``."""
    listed = list(pairs)
    cleaned: list[Pair | None] = [*listed]
    for place in _places_to_look_at([pair.source for pair in listed], [pair.target for pair in listed]):
        cleaned[place] = _clean_pair(listed[place], findings)
    return [pair for pair in cleaned if pair is not None]


def clean_block(block: Block, findings: Findings) -> Block:
    """Return what :func:`clean_pairs` returns as a block."""
    cleaned = replace(block, sources=list(block.sources), targets=list(block.targets))
    is_usable = [True] * len(block)
    for place in _places_to_look_at(block.sources, block.targets):
        pair = _clean_pair(block[place], findings)
        if pair is None:
            is_usable[place] = False
        else:
            cleaned.sources[place], cleaned.targets[place] = pair.source, pair.target
    return cleaned.only(is_usable)


def _code_points(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the code points of texts, and the places of the line breaks around each; a break inside is one more."""
    codes = np.frombuffer("\n".join(("", *texts, "")).encode("utf-32-le", "surrogatepass"), np.uint32)
    return codes, np.flatnonzero(codes == ord("\n"))


def _places_to_look_at(sources: list[str], targets: list[str]) -> Iterator[int]:
    """Give the places of the pairs with which anything may be wrong; the others are as they should be."""
    for at in range(0, len(sources), _AT_ONCE):
        sides = sources[at : at + _AT_ONCE], targets[at : at + _AT_ONCE]
        is_found = np.fromiter(map(eq, *sides), bool, len(sides[0]))
        for side in sides:
            texts = [text if len(text) <= _VERY_LONG else "" for text in side]
            codes, breaks = _code_points(texts)
            if len(breaks) > len(texts) + 1:
                codes, breaks = _code_points([text.replace("\n", "\r") for text in texts])
            kinds = np.take(_kinds_of_characters(), codes, mode="clip")
            is_found |= (kinds[breaks[:-1] + 1] == _NOT_AT_ENDS) | (kinds[breaks[1:] - 1] == _NOT_AT_ENDS)
            is_found[np.searchsorted(breaks, np.flatnonzero(kinds == _SUSPECT)) - 1] = True
        yield from (np.flatnonzero(is_found) + at).tolist()


@cache
def _kinds_of_characters() -> np.ndarray:
    """Return what each character below 2^16 may mean; the last entry is for all the others."""
    every = "".join(map(chr, range(0x10000)))
    shows_nothing = (character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in every)
    kinds = np.append(np.fromiter(shows_nothing, np.uint8, len(every)), np.uint8(True)) * _NOT_AT_ENDS
    kinds[[found.start() for found in _TO_LOOK_AT.finditer(every)]] = _SUSPECT
    return kinds


def _clean_pair(pair: Pair, findings: Findings) -> Pair | None:
    unusable = _unusable(pair)
    if unusable is not None:
        findings.add(unusable, pair)
        return None
    trimmed = Pair(pair.source.strip(), pair.target.strip(), pair.file, pair.line)
    if trimmed != pair:
        findings.add(Problem.OUTER_SPACE, pair)

    source, target = _LINE_BREAK.sub(" ", trimmed.source), _LINE_BREAK.sub(" ", trimmed.target)
    if (source, target) != (trimmed.source, trimmed.target):
        findings.add(Problem.LINE_BREAK, pair)
    if source == target:
        findings.add(Problem.IDENTICAL, pair)
    if max(len(source), len(target)) > _VERY_LONG:
        findings.add(Problem.VERY_LONG, pair)
    for problem, pattern in _KEPT.items():
        if pattern.search(source) or pattern.search(target):
            findings.add(problem, pair)
    if any(_COMBINING.search(side) and not unicodedata.is_normalized("NFC", side) for side in (source, target)):
        findings.add(Problem.DECOMPOSED, pair)
    return Pair(source, target, pair.file, pair.line)


def check_languages(pairs: Sequence[Pair], direction: Direction, findings: Findings) -> None:
    """Look at some of the pairs, evenly spread: sides that are swapped, or in other languages than the direction's."""
    unexpected = []
    sample = pairs[:: max(1, len(pairs) // _SAMPLED)]
    for pair in sample:
        if are_swapped(pair.source, pair.target, direction.source, direction.target):
            findings.add(Problem.SWAPPED, pair)
        elif is_other_language(pair.source, direction.source) or is_other_language(pair.target, direction.target):
            unexpected.append(pair)
    if len(unexpected) >= max(_SEVERAL, _SHARE * len(sample)):
        for pair in unexpected:
            findings.add(Problem.UNEXPECTED_LANGUAGE, pair)


def _unusable(pair: Pair) -> Problem | None:
    found = [unusable_text(side) for side in (pair.source, pair.target)]
    for problem in (Problem.WRONG_ENCODING, Problem.BLANK, Problem.CONTROL):
        if problem in found:
            return Problem.EMPTY_SIDE if problem is Problem.BLANK and found[0] != found[1] else problem
    return None


def unusable_text(text: str) -> Problem | None:
    """Return why nobody can learn from, or translate, a sentence; None where one can."""
    if _SURROGATE.search(text):
        return Problem.WRONG_ENCODING
    if is_empty(text):
        return Problem.BLANK
    return Problem.CONTROL if _CONTROL.search(text) else None
