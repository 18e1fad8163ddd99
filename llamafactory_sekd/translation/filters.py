"""What is wrong with a translation that nobody should train on."""

from __future__ import annotations

from collections.abc import Sequence

from llamafactory_sekd.data.checks import Problem
from llamafactory_sekd.data.languages import MIN_LETTERS, count_letters, is_other_language
from llamafactory_sekd.errors import ArgumentError, suggestion
from llamafactory_sekd.evaluation.guards import has_loop
from llamafactory_sekd.evaluation.translator import Translation


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
