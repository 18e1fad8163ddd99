"""Language codes, their English names (the prompt needs them) and translation directions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache

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
    return str(language.display_name("en"))


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
        try:
            if name is None and re.split("[-_]", code)[0] in _NO_LANGUAGES:
                raise DataError(code)
            name or language_name(code)
        except DataError:
            raise DataError(
                f"Unknown direction {text!r}: the language code {code!r} is not known; `sekd data pairs` takes a name "
                f"for it by {option}-name."
            ) from None
    return Direction(match[1], match[2], source_name, target_name)
