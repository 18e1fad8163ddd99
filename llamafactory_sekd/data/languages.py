"""Language codes, their English names (the prompt needs them) and translation directions."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llamafactory_sekd.errors import DataError


# ISO 639-1 codes; the names are the ones that WMT and FLORES use.
LANGUAGE_NAMES: dict[str, str] = {
    "af": "Afrikaans",
    "ar": "Arabic",
    "bg": "Bulgarian",
    "bn": "Bengali",
    "ca": "Catalan",
    "cs": "Czech",
    "cy": "Welsh",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "eu": "Basque",
    "fa": "Persian",
    "fi": "Finnish",
    "fr": "French",
    "ga": "Irish",
    "gl": "Galician",
    "gu": "Gujarati",
    "ha": "Hausa",
    "he": "Hebrew",
    "hi": "Hindi",
    "hr": "Croatian",
    "hu": "Hungarian",
    "id": "Indonesian",
    "is": "Icelandic",
    "it": "Italian",
    "ja": "Japanese",
    "ka": "Georgian",
    "kk": "Kazakh",
    "km": "Khmer",
    "ko": "Korean",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "mk": "Macedonian",
    "mr": "Marathi",
    "ms": "Malay",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "ps": "Pashto",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sk": "Slovak",
    "sl": "Slovenian",
    "sq": "Albanian",
    "sr": "Serbian",
    "sv": "Swedish",
    "sw": "Swahili",
    "ta": "Tamil",
    "te": "Telugu",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "uz": "Uzbek",
    "vi": "Vietnamese",
    "zh": "Chinese",
}


def language_name(code: str) -> str:
    """Return the English name of the ISO 639-1 ``code``; :class:`DataError` for a code that is not known."""
    try:
        return LANGUAGE_NAMES[code]
    except KeyError:
        known = ", ".join(LANGUAGE_NAMES)
        raise DataError(f"Unknown language code {code!r}: use one of {known}.") from None


@dataclass(frozen=True, order=True)
class Direction:
    """A translation direction, written ``en-de``: from ``source`` to ``target``."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}-{self.target}"

    @property
    def reversed(self) -> Direction:
        """Return the opposite direction."""
        return Direction(self.target, self.source)

    @property
    def slug(self) -> str:
        """The direction in the name of a dataset: ``en_de``."""
        return f"{self.source}_{self.target}"


def parse_direction(text: str) -> Direction:
    """Read ``en-de``; :class:`DataError` when the form is another or a language is unknown."""
    match = re.fullmatch(r"([a-z]+)-([a-z]+)", text)
    if match is None or match[1] == match[2]:
        raise DataError(f"Unknown direction {text!r}: write source-target with two language codes, such as en-de.")
    for code in match.groups():
        if code not in LANGUAGE_NAMES:
            raise DataError(f"Unknown direction {text!r}: the language code {code!r} is not known.")
    return Direction(match[1], match[2])
