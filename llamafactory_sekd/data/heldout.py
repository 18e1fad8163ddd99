"""Pairs that are held out of a corpus for validation and test, and what is too near to them to be trained on."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from itertools import compress

import numpy as np

from llamafactory_sekd.data.checks import Block, Findings, Pair, clean_pairs
from llamafactory_sekd.errors import DataError


_ENDS = 12  # letters at the beginning and the end of a sentence
_REACH = 18  # characters in which nearly every sentence has that many
_SHORTEST = 6  # letters of a sentence that is worth testing on
_ALIKE = 0.7  # the share of common letter trigrams from which two sentences count as one
_LARGEST = 0xFFFFFFFF  # checksum
_SPARE = 4  # candidates for each pair that is held out: some are unusable, or near to others
_GRAM_BITS = 10  # of hashes of trigrams
_ACROSS = 2  # trigrams that begin in one text and end in the next
_ASCII = [chr(code) for code in range(128)]
_SMALL = "".join(_ASCII).lower().encode() + bytes(range(128, 256))
_NO_LETTERS = bytes(code for code, sign in enumerate(_ASCII) if not sign.isalpha() and sign != "\n")


class HeldOut:
    """Chosen pairs and the test of what is near to them.

    Two pairs are near where their sources, or their targets, are the same but for case, digits, punctuation and white
    space, or begin or end with the same 12 letters and share 70 % of their different letter trigrams.

    Args:
        candidates: clean pairs; the first ones are held out, except those that begin or end as one before them does.
        count: how many of them.
    """

    def __init__(self, candidates: Iterable[Pair], count: int) -> None:
        self.pairs: list[Pair] = []
        # For both sides and both ends: twelve letters, and the letters of the sentence that begins or ends with them.
        self._by_end: dict[tuple[int, int], dict[str, str]] = {(side, end): {} for side in (0, 1) for end in (0, 1)}
        for pair in candidates:
            if len(self.pairs) == count:
                break
            letters = _letters([pair.source, pair.target])
            keys = {(side, end): _end_of(letters[side], end) for side, end in self._by_end}
            if not any(key in self._by_end[place] for place, key in keys.items()):
                self.pairs.append(pair)
                for (side, end), key in keys.items():
                    self._by_end[side, end][key] = letters[side]

    def near(self, block: Block) -> list[bool]:
        """Tell of each pair, whose sentences have no line breaks, whether it is held out or near to one that is."""
        found = [False] * len(block)
        for side, texts in enumerate((block.sources, block.targets)):
            for end in (0, 1):
                by_end = self._by_end[side, end]
                # The few characters at the end of a text decide about nearly all of them.
                short = _letters([text[-_REACH:] if end else text[:_REACH] for text in texts])
                keys = [letters[-_ENDS:] for letters in short] if end else [letters[:_ENDS] for letters in short]
                places = [
                    place
                    for place, key in enumerate(keys)
                    if key in by_end or (len(key) < _ENDS and len(texts[place]) > _REACH)
                ]
                candidates = []
                for place, letters in zip(places, _letters([texts[place] for place in places]), strict=True):
                    held = by_end.get(_end_of(letters, end))
                    if held is not None:
                        candidates.append((place, letters, held))
                for place, letters, held in compress(candidates, _may_be_alike(candidates)):
                    found[place] = found[place] or _alike(letters, held)
        return found


def hold_out(blocks: Iterable[Block], count: int) -> HeldOut:
    """Choose `count` pairs by the checksum of their source, so that the same corpus gives the same ones in any order.

    Args:
        blocks: the corpus, many pairs at a time.
        count: how many.

    Raises:
        DataError: the corpus has fewer that are usable and differ enough from each other.
    """
    wanted, largest = _SPARE * count + 100, _LARGEST
    best: dict[int, Pair] = {}  # the first pair of each of the smallest checksums, and some more of them
    for block in blocks:
        checksums = [zlib.crc32(source.encode(block.encoding, "surrogatepass")) for source in block.sources]
        for place in compress(range(len(block)), map(largest.__ge__, checksums)):
            best.setdefault(checksums[place], block[place])
        if len(best) > 1.2 * wanted:
            best = dict(sorted(best.items())[:wanted])
            largest = max(best)

    candidates = [pair for _, pair in sorted(best.items())[:wanted]]
    chosen = HeldOut(filter(_is_worth_testing_on, clean_pairs(candidates, Findings())), count)
    if len(chosen.pairs) < count:
        raise DataError(
            f"--valid and --test ask for {count:,} pairs, and only {len(chosen.pairs):,} of the {len(candidates):,} "
            f"candidates have letters on both sides and differ enough from each other: ask for fewer."
        )
    return chosen


def _is_worth_testing_on(pair: Pair) -> bool:
    return pair.source != pair.target and min(map(len, _letters([pair.source, pair.target]))) >= _SHORTEST


def _letters(texts: Sequence[str]) -> list[str]:
    """Return the letters of texts without line breaks, without their case: of all texts at once."""
    joined = "\n".join(texts).encode("utf-8", "surrogatepass").translate(_SMALL, _NO_LETTERS)
    letters = joined.decode("utf-8", "surrogatepass")
    if not letters.isascii():
        letters = letters.casefold()
        if not letters.replace("\n", "").isalpha():
            for sign in set(letters) - {"\n"}:
                letters = letters if sign.isalpha() else letters.replace(sign, "")
    return letters.split("\n") if texts else []


def _end_of(letters: str, end: int) -> str:
    return letters[-_ENDS:] if end else letters[:_ENDS]


def _alike(text: str, held: str) -> bool:
    """Tell whether the letters of a text and of one that is held out are nearly the same."""
    shorter, longer = sorted((len(text), len(held)))
    if 2 * shorter < _ALIKE * (shorter + longer):
        return False
    ours, theirs = ({letters[place : place + 3] for place in range(len(letters) - 2)} for letters in (text, held))
    return text == held or 2 * len(ours & theirs) >= _ALIKE * (len(ours) + len(theirs))


def _may_be_alike(candidates: Sequence[tuple[int, str, str]]) -> np.ndarray:
    """Tell of each place, text and held text whether the texts may be alike: a bit for each trigram's hash decides."""
    texts, others = [text for _, text, _ in candidates], [held for _, _, held in candidates]
    lengths = np.array([len(text) + len(held) for _, text, held in candidates])
    differing = (_trigram_bits(texts) ^ _trigram_bits(others)).view(np.uint64).sum(axis=1)  # eight sums, side by side
    # No more bits differ than trigrams that only one of both has, of which there may be 30 % of those of each.
    return differing.view(np.uint8).reshape(-1, 8).sum(axis=1) <= (1 - _ALIKE) * lengths + 2 * _ACROSS


def _trigram_bits(texts: list[str]) -> np.ndarray:
    """Return bits [texts, 2^10] of the hashes of their trigrams, and of those that reach into the next text."""
    codes = np.frombuffer("".join([*texts, "\n" * _ACROSS]).encode("utf-32-le"), np.uint32)
    hashes = (codes[:-2] * 0x9E3779B1 + codes[1:-1] * 0x85EBCA77 + codes[2:] * 0xC2B2AE3D) >> (32 - _GRAM_BITS)
    bits = np.zeros((len(texts), 1 << _GRAM_BITS), bool)
    bits.ravel()[hashes + np.repeat(np.arange(len(texts)) << _GRAM_BITS, [len(text) for text in texts])] = True
    return bits
