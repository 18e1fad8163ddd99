"""Pairs that are held out of a corpus for validation and test, and what is too near to them to be trained on."""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Iterable, Sequence

from llamafactory_sekd.data.checks import Findings, Pair, clean_pair
from llamafactory_sekd.errors import DataError


_BETWEEN = "\ua7ff"  # a letter that no text has
_ENDS = 12  # letters at the beginning and the end of a sentence
_REACH = 24  # characters in which nearly every sentence has that many
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
                if known.keys().isdisjoint(ends):
                    continue
                for place, key in enumerate(ends):
                    other = known.get(key)
                    if other is not None and _alike(_letters(texts[place]), other):
                        found[place] = True
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
    found = [letters[:_ENDS] for letters in _letters_of_all([text[:_REACH] for text in texts])]
    return [key if len(key) == _ENDS else _letters(texts[place])[:_ENDS] for place, key in enumerate(found)]


def _ends(texts: list[str]) -> list[str]:
    """Return the last letters of each text."""
    found = [letters[-_ENDS:] for letters in _letters_of_all([text[-_REACH:] for text in texts])]
    return [key if len(key) == _ENDS else _letters(texts[place])[-_ENDS:] for place, key in enumerate(found)]


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


def _alike(first: str, second: str) -> bool:
    if first == second:
        return True
    shorter, longer = sorted((len(first), len(second)))
    if 2 * shorter < _ALIKE * (shorter + longer):  # too different in length for what follows
        return False
    ours, theirs = _trigrams(first), _trigrams(second)
    return 2 * len(ours & theirs) >= _ALIKE * (len(ours) + len(theirs))


def _trigrams(text: str) -> frozenset[tuple[str, str, str]]:
    return frozenset(zip(text, text[1:], text[2:], strict=False))
