"""Wrong references of the kinds that crawled parallel text has, made on purpose, so that it is known which are wrong.

The kinds are those that Khayrallah and Koehn ("On the impact of various types of noise on neural machine translation",
2018) and Kreutzer et al. ("Quality at a glance", 2022) find in crawled corpora.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from llamafactory_sekd.errors import DataError


Pair = tuple[str, str]
# Kind -> what it does, as reports say it.
KINDS = {
    "exchanged": "the references of unrelated sentences",
    "shifted": "the references of the next sentence, as after a slip in the alignment",
    "copied": "the source, untranslated",
    "cut": "the first part of the reference alone",
    "wrong_language": "a translation into another language",
}


def spoil(
    pairs: Sequence[Pair], share: float, kind: str, seed: int, foreign: Mapping[str, str] | None = None
) -> tuple[list[Pair], list[bool]]:
    """Give a share of the pairs a wrong reference; the sources and the order stay.

    Args:
        pairs: (source, target); for `shifted` in the order in which neighbors follow each other.
        share: how many are to be wrong, 0 to 1.
        kind: one of :data:`KINDS`.
        seed: decides which ones.
        foreign: for `wrong_language`: source → its translation into the other language.

    Returns:
        The pairs, and which of them are wrong.

    Raises:
        DataError: the kind is unknown, or fewer pairs than asked for can be spoiled in this way.
    """
    if kind not in KINDS:
        raise DataError(f"{kind!r} is no kind of noise: use one of {', '.join(KINDS)}.")
    count = round(share * len(pairs))
    possible = [index for index in range(len(pairs)) if _can_be_wrong(pairs, index, kind, foreign or {})]
    if count > len(possible):
        raise DataError(f"{count} of {len(pairs)} pairs cannot be {kind}: only {len(possible)} can.")
    chosen = random.Random(f"{kind}-{seed}").sample(possible, count)
    # In a circle, so that each takes another one's reference and every reference stays in the corpus.
    following = dict(zip(chosen, [*chosen[1:], *chosen[:1]], strict=True))
    wrong: Mapping[str, Callable[[int], str]] = {
        "exchanged": lambda index: pairs[following[index]][1],
        "shifted": lambda index: pairs[(index + 1) % len(pairs)][1],
        "copied": lambda index: pairs[index][0],
        "cut": lambda index: _first_part(pairs[index][1]),
        "wrong_language": lambda index: (foreign or {})[pairs[index][0]],
    }
    spoiled = list(pairs)
    for index in chosen:
        spoiled[index] = (pairs[index][0], wrong[kind](index))
    return spoiled, [index in following for index in range(len(pairs))]


def _can_be_wrong(pairs: Sequence[Pair], index: int, kind: str, foreign: Mapping[str, str]) -> bool:
    source, target = pairs[index]
    if kind == "shifted":
        return pairs[(index + 1) % len(pairs)][1] != target
    if kind == "copied":
        return source != target
    if kind == "cut":
        return _first_part(target) != target
    if kind == "wrong_language":
        return foreign.get(source, target) != target
    return len(pairs) > 1


def _first_part(text: str) -> str:
    """Return the first third of the words, at least one."""
    words = text.split()
    return " ".join(words[: max(1, len(words) // 3)])
