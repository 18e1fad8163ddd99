"""Which language a sentence is in, and when that is certain enough to say something."""

from __future__ import annotations

import re
import unicodedata
from functools import cache, lru_cache
from typing import Any

from llamafactory_sekd.data.languages import base_code, script_of


# With fewer letters the language of a sentence is not judged. One of Chinese, Japanese or Korean counts as three.
MIN_LETTERS = 20
# From how much certainty on another language counts as found. benchmarks/guards.py measures what each language needs
# for at most about 1 % of false alarms; the table is in docs/evaluation.md. A language that was not measured is taken
# for one of the difficult ones.
MIN_CERTAINTY = 0.99
NEEDED_CERTAINTY = {
    **dict.fromkeys(
        ("cs", "el", "en", "fa", "fi", "fr", "he", "hu", "id", "it", "ka", "ko", "lv", "pl", "ro", "tr", "vi"), 0.9
    ),
    **dict.fromkeys(("ar", "ca", "da", "de", "es", "gl", "hr", "ja", "lt", "no", "pt", "sk", "sl", "sv", "zh"), 0.99),
    **dict.fromkeys(("bg", "et", "nl", "ru", "uk"), 0.999),
}
# Languages that the identifier cannot tell apart: to find one where the other was asked for means nothing.
CONFUSABLE = (
    frozenset({"da", "nb", "nn", "no"}),
    frozenset({"bs", "hr", "sr"}),
    frozenset({"id", "ms"}),
    frozenset({"cs", "sk"}),
    frozenset({"an", "es", "gl"}),
    frozenset({"gl", "pt"}),
    frozenset({"bg", "mk"}),
    frozenset({"bg", "ru"}),
    frozenset({"be", "ru"}),
    frozenset({"af", "nl"}),
    frozenset({"de", "lb"}),
    frozenset({"fr", "oc", "wa"}),
    frozenset({"ca", "oc"}),
)
# Where it has another code than ours.
_OTHER_CODES = {"fil": "tl"}
# A script in a code, as in sr-Latn and zho_Hant.
_SCRIPT = re.compile(r"[-_][A-Z][a-z]{3}(?![A-Za-z])")
# With a smaller share of letters of its own script a sentence is in another one: names and brands may be in Latin.
_OWN_SCRIPT = 0.2
# How Unicode's names of a script's letters begin.
_LETTERS_OF: dict[str, tuple[str, ...]] = {
    "Arab": ("ARABIC",),
    "Armn": ("ARMENIAN",),
    "Beng": ("BENGALI",),
    "Cyrl": ("CYRILLIC",),
    "Deva": ("DEVANAGARI",),
    "Ethi": ("ETHIOPIC",),
    "Geor": ("GEORGIAN",),
    "Grek": ("GREEK",),
    "Gujr": ("GUJARATI",),
    "Guru": ("GURMUKHI",),
    "Hans": ("CJK",),
    "Hant": ("CJK",),
    "Hebr": ("HEBREW",),
    "Jpan": ("CJK", "HIRAGANA", "KATAKANA"),
    "Khmr": ("KHMER",),
    "Knda": ("KANNADA",),
    "Kore": ("CJK", "HANGUL"),
    "Laoo": ("LAO",),
    "Latn": ("LATIN",),
    "Mlym": ("MALAYALAM",),
    "Mtei": ("MEETEI MAYEK",),
    "Mymr": ("MYANMAR",),
    "Olck": ("OL CHIKI",),
    "Orya": ("ORIYA",),
    "Sinh": ("SINHALA",),
    "Taml": ("TAMIL",),
    "Telu": ("TELUGU",),
    "Tfng": ("TIFINAGH",),
    "Thai": ("THAI",),
    "Tibt": ("TIBETAN",),
}


def is_identifiable(language: str) -> bool:
    """Tell whether the identifier knows a language, given by a code of any kind."""
    return _base(language) in identifier().nb_classes


def _base(language: str) -> str:
    """Return the identifier's code of a language."""
    base = base_code(language)
    return _OTHER_CODES.get(base, base)


def is_other_language(line: str, language: str) -> bool:
    """Tell whether ``line`` is, with the certainty that ``language`` needs, in a language not to be taken for it.

    Args:
        line: a sentence.
        language: a code of any kind. Where it names a script, or the identifier does not know the language, letters of
            another script are another language, too. Nothing else is told of a language that it does not know.
    """
    if count_letters(line) < MIN_LETTERS:
        return False
    is_known = is_identifiable(language)
    if (not is_known or _SCRIPT.search(language)) and _is_other_script(line, script_of(language)):
        return True
    if not is_known:
        return False
    base = _base(language)
    found, certainty = identify(line)
    return not _is_taken_for(found, base) and certainty >= NEEDED_CERTAINTY.get(base, MIN_CERTAINTY)


def _is_other_script(line: str, script: str) -> bool:
    """Tell whether most letters are of other scripts than the one with this ISO 15924 code."""
    names = _LETTERS_OF.get(script)
    if names is None:
        return False
    letters = [character for character in line if character.isalpha()]
    own = sum(unicodedata.name(letter, "").startswith(names) for letter in letters)
    return own < _OWN_SCRIPT * len(letters)


def differs_in_language(line: str, reference: str) -> bool:
    """Tell whether ``line`` is certainly in another language than ``reference``, whose code nobody said."""
    if count_letters(reference) < MIN_LETTERS:
        return False
    language, certainty = identify(reference)
    return certainty >= NEEDED_CERTAINTY.get(language, MIN_CERTAINTY) and is_other_language(line, language)


def count_letters(line: str) -> int:
    """Return how many letters ``line`` has, those of Chinese, Japanese and Korean counted three times."""
    return sum(3 if character >= "\u2e80" else 1 for character in line if character.isalpha())


def _is_taken_for(found: str, language: str) -> bool:
    """Tell whether what was found may be ``language``: itself, or one that the identifier takes for it."""
    return found == language or any(found in group and language in group for group in CONFUSABLE)


def are_swapped(source: str, target: str, source_language: str, target_language: str) -> bool:
    """Tell whether two sides are certainly in each other's language; languages by codes of any kind."""
    source_language, target_language = _base(source_language), _base(target_language)
    if _is_taken_for(source_language, target_language) or min(map(count_letters, (source, target))) < MIN_LETTERS:
        return False
    return all(
        _is_taken_for(found, other) and certainty >= NEEDED_CERTAINTY.get(language, MIN_CERTAINTY)
        for (found, certainty), language, other in (
            (identify(source), source_language, target_language),
            (identify(target), target_language, source_language),
        )
    )


@lru_cache(maxsize=1000)
def identify(line: str) -> tuple[str, float]:
    """Return the language of a sentence and how certain that is; the same sentence is often asked for twice."""
    found, certainty = identifier().classify(line)
    return str(found), float(certainty)


@cache
def identifier() -> Any:
    """Return py3langid's model with all its languages; it is part of the package."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_pickled_model(MODEL_FILE, norm_probs=True)
