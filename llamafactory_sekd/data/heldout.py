"""Pairs that are held out of a corpus for validation and test, and what is too near to them to be trained on."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import compress

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from llamafactory_sekd.data.checks import Block, Findings, Pair, clean_pairs, code_points
from llamafactory_sekd.errors import DataError


_ENDS = 12  # letters at the beginning and the end of a sentence
_REACH = 18  # characters in which nearly every sentence has that many
_SHORTEST = 6  # letters of a sentence that is worth testing on
_ALIKE = 0.7  # the share of common letter trigrams from which two sentences count as one
_LARGEST = 0xFFFFFFFF  # checksum
_LONG = 1000  # characters of a text that is not hashed in one piece
_SPARE = 4  # candidates for each pair that is held out: some are unusable, or near to others
_HASH_BITS, _GRAM_BITS = 20, 10  # of hashes of ends and of trigrams
_MIX = np.random.default_rng(0).integers(1 << 63, size=_ENDS, dtype=np.uint64) * 2 + 1
_UNSURE = 1  # in place of a letter beyond 16 bits, or one that becomes three without its case
_COLUMNS = np.arange(2 * _REACH, dtype=np.uint8)
_ACROSS = 2  # trigrams that begin in one text and end in the next


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
            letters = _letters(pair.source), _letters(pair.target)
            keys = {(side, end): _end_of(letters[side], end) for side, end in self._by_end}
            if not any(key in self._by_end[place] for place, key in keys.items()):
                self.pairs.append(pair)
                for (side, end), key in keys.items():
                    self._by_end[side, end][key] = letters[side]
        # For nearly all texts, the hash of their first or last letters says that none of those is theirs.
        self._hashes = {place: np.zeros(1 << _HASH_BITS, bool) for place in self._by_end}
        for (side, end), known in self._by_end.items():
            self._hashes[side, end][_hashes_of_ends(list(known))[end][0]] = True

    def near(self, block: Block) -> list[bool]:
        """Tell of each pair, whose sentences have no line breaks, whether it is held out or near to one that is."""
        found = [False] * len(block)
        for side, texts in enumerate((block.sources, block.targets)):
            for end, (hashes, is_unsure) in enumerate(_hashes_of_ends(texts)):
                candidates = []
                for place in np.flatnonzero(self._hashes[side, end][hashes] | is_unsure).tolist():
                    letters = _letters(texts[place])
                    held = self._by_end[side, end].get(_end_of(letters, end))
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
    return pair.source != pair.target and min(len(_letters(pair.source)), len(_letters(pair.target))) >= _SHORTEST


def _letters(text: str) -> str:
    """Return the letters of a text without their case: first what is ASCII, at once, then the few other signs."""
    folded = text.casefold().encode("utf-8", "surrogatepass")
    letters = folded.translate(None, _NO_LETTERS).decode("utf-8", "surrogatepass")
    return letters if letters.isalpha() else "".join(filter(str.isalpha, letters))


_NO_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())


def _end_of(letters: str, end: int) -> str:
    return letters[-_ENDS:] if end else letters[:_ENDS]


def _alike(text: str, held: str) -> bool:
    """Tell whether the letters of a text and of one that is held out are nearly the same."""
    shorter, longer = sorted((len(text), len(held)))
    if 2 * shorter < _ALIKE * (shorter + longer):
        return False
    ours, theirs = ({letters[place : place + 3] for place in range(len(letters) - 2)} for letters in (text, held))
    return text == held or 2 * len(ours & theirs) >= _ALIKE * (len(ours) + len(theirs))


# What follows looks at thousands of texts at once, and finds that most of them are near to nothing.


def _hashes_of_ends(texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for the beginnings and for the ends of texts without line breaks, a hash of each one's letters.

    The second array of each says where the hash may be another one than that of the same letters alone.
    """
    shortened = [text if len(text) < _LONG else text[:_REACH] + text[-_REACH:] for text in texts]
    codes, breaks = code_points(shortened, _REACH)
    lengths = np.minimum(np.diff(breaks) - 1, _REACH + 1).astype(np.uint8)
    windows = sliding_window_view(codes, _REACH)
    found = []
    for part, step in ((windows[breaks[:-1] + 1], 1), (windows[breaks[1:] - _REACH], -1)):
        letters = np.take(_letters_of_codes(), part, mode="clip").view(np.uint16)[:, ::step]
        letters[lengths[:, None] <= _COLUMNS // 2] = 0  # those of the texts before and after
        is_letter = letters != 0
        counts = np.einsum("ij->i", is_letter.view(np.uint8))
        in_a_row = np.append(letters.ravel()[np.flatnonzero(is_letter)], np.zeros(_ENDS, np.uint16))
        keys = sliding_window_view(in_a_row, _ENDS)[np.cumsum(counts, dtype=int) - counts]
        keys[_COLUMNS[:_ENDS] >= counts[:, None]] = 0
        is_unsure = (keys == _UNSURE).any(axis=1) | ((counts < _ENDS) & (lengths > _REACH))
        found.append((keys.astype(np.uint64) @ _MIX >> np.uint64(64 - _HASH_BITS), is_unsure))
    return found


@cache
def _letters_of_codes() -> np.ndarray:
    """Return the one or two letters that each character below 2^16 has without its case, 16 bits each, 0 for none."""
    every = "".join(map(chr, range(0x10000)))
    table = np.zeros((len(every) + 1, 2), np.uint16)
    table[:-1, 0] = np.arange(len(every)) * np.fromiter(map(str.isalpha, every), bool)
    table[-1, 0] = _UNSURE  # all other characters
    for code, character in enumerate(every):
        if character != character.casefold():
            letters = [ord(letter) for letter in _letters(character)]
            table[code] = ([*letters, 0, 0] if len(letters) < 3 else [_UNSURE, 0])[:2]
    return table.view(np.uint32).ravel()


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
