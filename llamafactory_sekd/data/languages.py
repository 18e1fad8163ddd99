"""Language codes, their English names (the prompt needs them), directions, and which language a text is in."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from llamafactory_sekd.errors import DataError


# BCP 47 with its usual capitals (pt-BR, zh-Hant), ISO 639-1 and 639-3 (de, deu), and FLORES (deu_Latn). The capitals
# tell a territory from a language, so a direction can be divided in one way only.
_CODE = r"[a-z]{2,3}(?:[-_][A-Z][a-z]{3})?(?:[-_](?:[A-Z]{2}|[0-9]{3}))?(?:-[a-z0-9]{5,8})*"
_DIRECTION = re.compile(rf"({_CODE})-({_CODE})")

# Names that read better in a sentence than those of the library, which are like "Portuguese (Brazil)".
_NAMES: dict[str, str] = {
    "bn": "Bengali",  # the name of WMT and FLORES
    "ar": "Arabic",
    "arb": "Arabic",
    "cmn": "Chinese",
    "swh": "Swahili",
    "pes": "Persian",
    "npi": "Nepali",
    "ory": "Odia",
    "luo": "Luo",
    # The library does not know their usual script.
    "acm-Arab": "Mesopotamian Arabic",
    "acq-Arab": "Ta'izzi-Adeni Arabic",
    "ajp-Arab": "South Levantine Arabic",
    "ko-Hang": "Korean",
    "pbt-Arab": "Southern Pashto",
    "prs": "Dari",
    "fa-AF": "Dari",
    "de-AT": "Austrian German",
    "de-CH": "Swiss High German",
    "en-AU": "Australian English",
    "en-CA": "Canadian English",
    "en-GB": "British English",
    "en-US": "American English",
    "es-419": "Latin American Spanish",
    "es-ES": "European Spanish",
    "es-MX": "Mexican Spanish",
    "fr-CA": "Canadian French",
    "fr-CH": "Swiss French",
    "nl-BE": "Flemish",
    "pt-BR": "Brazilian Portuguese",
    "pt-PT": "European Portuguese",
    "zh-Hans": "Simplified Chinese",
    "zh-Hant": "Traditional Chinese",
    "cmn-Hans": "Simplified Chinese",
    "cmn-Hant": "Traditional Chinese",
}
# Codes for several languages, for none, for unknown ones: nobody translates into them.
_NO_LANGUAGES = frozenset({"mis", "mul", "und", "zxx"})
# The library's names of private codes and of groups: "Unknown language [qaa]", "Sign languages".
_NO_NAME = re.compile(r"Unknown language.*|.* languages")


@cache
def language_name(code: str) -> str:
    """Return the English name of a BCP 47, ISO 639 or FLORES ``code``.

    A script is part of the name only where the language is usually written in another one, or in several.

    Raises:
        DataError: the code is not known.
    """
    from langcodes import Language, LanguageTagError

    try:
        language = Language.get(code) if re.fullmatch(_CODE, code) else None
    except LanguageTagError:
        language = None
    if language is None or not language.is_valid():
        raise DataError(
            f"Unknown language code {code!r}: use one of BCP 47 (de, pt-BR), ISO 639-3 (deu) or FLORES (deu_Latn), "
            "or give the name of the language as well (--from-name, --to-name)."
        )
    tag = str(language)
    if tag in _NAMES:
        return _NAMES[tag]
    usual = Language.get(language.language or code).maximize().script
    if language.script and language.script == usual:
        return language_name("-".join(part for part in (language.language, language.territory) if part))
    name = str(language.display_name("en"))
    if _NO_NAME.fullmatch(name):
        raise DataError(
            f"The code {code!r} is of no single language ({name}): use the code of one, or give its name as well "
            "(--from-name, --to-name)."
        )
    return name


@cache
def base_code(code: str) -> str:
    """Return the code of the language alone, shortest form: ``pt`` for ``pt-BR``, ``de`` for ``deu_Latn``.

    Tokenizers and language detectors know languages by it. A code that is not known is its own base.
    """
    from langcodes import Language, LanguageTagError

    try:
        language = Language.get(code).prefer_macrolanguage().language or code
    except LanguageTagError:
        return code
    return str(language)


@cache
def script_of(code: str) -> str:
    """Return the ISO 15924 code of the script that a language is written in, the usual one where ``code`` has none.

    Empty for a code that is not known.
    """
    from langcodes import Language, LanguageTagError

    try:
        return str(Language.get(code).maximize().script or "")
    except LanguageTagError:
        return ""


@dataclass(frozen=True, order=True)
class Direction:
    """A translation direction, written ``en-de``: from ``source`` to ``target``.

    ``source_name`` and ``target_name`` are names of the user's own, in place of the usual ones.
    """

    source: str
    target: str
    source_name: str | None = field(default=None, compare=False)
    target_name: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.source}-{self.target}"

    @property
    def reversed(self) -> Direction:
        """Return the opposite direction."""
        return Direction(self.target, self.source, self.target_name, self.source_name)

    @property
    def slug(self) -> str:
        """The direction in the name of a dataset: ``en_de``."""
        return f"{self.source}_{self.target}".replace("-", "_")

    @property
    def source_language(self) -> str:
        """The source language's name in a prompt: ``English``."""
        return self.source_name or language_name(self.source)

    @property
    def target_language(self) -> str:
        """The target language's name in a prompt: ``German``."""
        return self.target_name or language_name(self.target)


def parse_direction(text: str, source_name: str | None = None, target_name: str | None = None) -> Direction:
    """Read ``en-de``, ``en-pt-BR`` or ``eng_Latn-deu_Latn``.

    Args:
        text: the two codes, joined by a hyphen.
        source_name: the source language's name; with one, its code need not be known.
        target_name: the same for the target language.

    Raises:
        DataError: the form is another, or a language is unknown.
    """
    if isinstance(text, bool):
        raise DataError(f"A language code became {text} in YAML, which reads no, off, on and yes so: quote it.")
    match = _DIRECTION.fullmatch(str(text))
    if match is None or match[1] == match[2]:
        raise DataError(
            f"Unknown direction {text!r}: write source-target with two different language codes, such as en-de, "
            "en-pt-BR or en-zh-Hant (capitals tell a territory or script from a language)."
        )
    for code, name, option in zip(match.groups(), (source_name, target_name), ("--from", "--to"), strict=True):
        if name is not None and any(unicodedata.category(sign) in ("Cc", "Zl", "Zp") for sign in name):
            raise DataError(f"The language's name {name!r} has a line break or another control character.")
        try:
            if name is None and re.split("[-_]", code)[0] in _NO_LANGUAGES:
                raise DataError(code)
            name or language_name(code)
        except DataError:
            raise DataError(
                f"Unknown direction {text!r}: the language code {code!r} is not known; `sekd data pairs` takes a name "
                f"for it by {option}-name."
            ) from None
    direction = Direction(match[1], match[2], source_name, target_name)
    if None in (source_name, target_name) and direction.source_language == direction.target_language:
        raise DataError(
            f"Unknown direction {text!r}: both codes are of {direction.source_language}; write source-target with two "
            "different languages."
        )
    return direction


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
