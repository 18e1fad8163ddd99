"""Pairs that are held out of a corpus for validation and test, and what is too near to them to be trained on."""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import compress, count
from operator import itemgetter

from llamafactory_sekd.data.checks import Findings, Pair, clean_pair
from llamafactory_sekd.errors import DataError


_BETWEEN = "\ua7ff"  # a letter that no text has
_ENDS = 12  # letters at the beginning and the end of a sentence
_REACH = 18  # characters in which nearly every sentence has that many
_SHORTEST = 6  # letters of a sentence that is worth testing on
_ALIKE = 0.7  # the share of common letter trigrams from which two sentences count as one
_LARGEST = 0xFFFFFFFF  # checksum
_AS_BYTES = ("utf-8", "surrogatepass")
_SPARE = 4  # candidates for each pair that is held out: some are unusable, or near to others


class HeldOut:
    """Chosen pairs and the test of what is near to them.

    Two pairs are near where their sources, or their targets, are the same but for case, digits, punctuation and white
    space, or begin or end with the same 12 letters and share 70 % of their different letter trigrams.
    """

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        # For both sides and both ends: twelve letters, and the letters of the sentence that begins or ends with them.
        self._by_end: dict[tuple[int, int], dict[str, str]] = {(side, end): {} for side in (0, 1) for end in (0, 1)}

    def add(self, pair: Pair) -> bool:
        """Hold a pair out, unless it begins or ends as one of the others does; return whether it was."""
        keys = {key: text for side, text in _sides(pair) for key in _keys(side, text)}
        if any(key in self._by_end[side, end] for side, end, key in keys):
            return False
        for (side, end, key), text in keys.items():
            self._by_end[side, end][key] = _letters(text)
        self.pairs.append(pair)
        return True

    def near(self, pairs: list[Pair]) -> list[bool]:
        """Tell of each pair whether it is one of those held out, or near to one."""
        found = [False] * len(pairs)
        for side, texts in enumerate(([pair.source for pair in pairs], [pair.target for pair in pairs])):
            for end, ends in enumerate((_starts(texts), _ends(texts))):
                known = self._by_end[side, end]
                for place in compress(count(), map(known.__contains__, ends)):
                    if not found[place]:
                        found[place] = _alike(_letters(texts[place]), known[ends[place]], end)
        return found


def hold_out(blocks: Iterable[Sequence[Pair]], count: int) -> HeldOut:
    """Choose `count` pairs by the checksum of their source, so that the same corpus gives the same ones in any order.

    Args:
        blocks: the corpus, many pairs at a time.
        count: how many.

    Raises:
        DataError: the corpus has fewer that are usable and differ enough from each other.
    """
    # The smallest checksums, largest first (as negative numbers), with equal sources once.
    best: list[tuple[int, Pair]] = []
    known: set[int] = set()
    wanted = _SPARE * count + 100
    for block in blocks:
        largest = -best[0][0] if len(best) == wanted else _LARGEST
        for place, checksum in enumerate(map(zlib.crc32, [pair.source.encode(*_AS_BYTES) for pair in block])):
            if checksum > largest or -checksum in known:
                continue
            known.add(-checksum)
            if len(best) < wanted:
                heapq.heappush(best, (-checksum, block[place]))
            else:
                known.discard(heapq.heapreplace(best, (-checksum, block[place]))[0])
            largest = -best[0][0] if len(best) == wanted else _LARGEST

    chosen = HeldOut()
    for _, pair in sorted(best, key=lambda item: -item[0]):
        if len(chosen.pairs) == count:
            break
        cleaned = clean_pair(pair, Findings())
        if cleaned is not None and cleaned.source != cleaned.target and _has_enough_letters(cleaned):
            chosen.add(cleaned)
    if len(chosen.pairs) < count:
        raise DataError(
            f"--valid and --test ask for {count:,} pairs, and only {len(chosen.pairs):,} of the {len(best):,} "
            f"candidates have letters on both sides and differ enough from each other: ask for fewer."
        )
    return chosen


def _has_enough_letters(pair: Pair) -> bool:
    return min(len(_letters(pair.source)), len(_letters(pair.target))) >= _SHORTEST


def _sides(pair: Pair) -> tuple[tuple[int, str], tuple[int, str]]:
    return (0, pair.source), (1, pair.target)


def _keys(side: int, text: str) -> tuple[tuple[int, int, str], tuple[int, int, str]]:
    return (side, 0, _starts([text])[0]), (side, 1, _ends([text])[0])


def _starts(texts: list[str]) -> list[str]:
    """Return the first letters of each text."""
    return _ends_of(texts, slice(_REACH), slice(_ENDS))


def _ends(texts: list[str]) -> list[str]:
    """Return the last letters of each text."""
    return _ends_of(texts, slice(-_REACH, None), slice(-_ENDS, None))


def _ends_of(texts: list[str], reach: slice, end: slice) -> list[str]:
    # Without a step of Python for each text, but for the few that have not enough letters within reach.
    keys = list(map(itemgetter(end), _letters_of_all(list(map(itemgetter(reach), texts)))))
    for place in compress(count(), map(_ENDS.__gt__, map(len, keys))):
        keys[place] = _letters(texts[place])[end]
    return keys


def _letters_of_all(texts: list[str]) -> list[str]:
    """Return :func:`_letters` of each text; all at once takes a tenth of the time."""
    found = _letters(_BETWEEN.join(texts)).split(_BETWEEN)
    return found if len(found) == len(texts) else [_letters(text) for text in texts]


def _letters(text: str) -> str:
    """Return the letters of a text without their case: first what is ASCII, at once, then the few other signs."""
    folded = text.casefold().encode("utf-8", "surrogatepass")
    letters = folded.translate(None, _NO_LETTERS).decode("utf-8", "surrogatepass")
    if not letters.isalpha():
        for character in set(letters):
            if not character.isalpha():
                letters = letters.replace(character, "")
    return letters


_NO_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())


def _alike(text: str, held: str, end: int) -> bool:
    """Tell whether the letters of a text and of one that is held out are nearly the same.

    ``end`` is 0 where they begin with the same ones, 1 where they end with them: the search for differences starts at
    the other end.
    """
    if text == held:
        return True
    shorter, longer = sorted((len(text), len(held)))
    if 2 * shorter < _ALIKE * (shorter + longer):  # too different in length for what follows
        return False
    # With n trigrams, of which the other lacks k, 2 (n - k) must be `_ALIKE` of (n + m) or more. Most texts lack too
    # many for even the largest n, which shows after a part of them.
    theirs = _count_trigrams(held)
    most = (1 - _ALIKE / 2) * (len(text) - 2) - _ALIKE / 2 * theirs
    lacking: set[str] = set()
    for place in range(len(text) - 2) if end else range(len(text) - 3, -1, -1):
        trigram = text[place : place + 3]
        if trigram not in held:
            lacking.add(trigram)
            if len(lacking) > most:
                return False
    ours = _count_trigrams.__wrapped__(text)
    return 2 * (ours - len(lacking)) >= _ALIKE * (ours + theirs)


@cache
def _count_trigrams(text: str) -> int:
    """Return how many different trigrams a text has; kept for those that are held out, which are asked for often."""
    return len({text[place : place + 3] for place in range(len(text) - 2)})
