"""False alarms and hits of the evaluation's guards per language, on the strings of Home Assistant's interface.

    pip download --no-deps --ignore-requires-python homeassistant==2024.3.3 -d DIR
    python benchmarks/guards.py DIR/homeassistant-2024.3.3-py3-none-any.whl [--sentences 800]

The strings are short, which is harder than running text; those without markup and with 20 letters or more are used.
``alarms`` is the share of a language's own strings that the guard calls another language, ``English`` the share of
English strings that it finds where that language was asked for, ``others`` the same for strings of all languages that
do not count as one with it, and ``needs`` the smallest certainty that keeps false alarms at 1 % in the first half of
the strings; the shares are of the second half. ``loops`` is the share of own strings called a repetition.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from llamafactory_sekd.data import languages
from llamafactory_sekd.data.languages import language_name
from llamafactory_sekd.errors import DataError
from llamafactory_sekd.evaluation import guards


SEED = 0
FEWEST = 40
CERTAINTIES = (0.9, 0.99, 0.999, 0.9999)
# The wheel's names of what we know by another one.
ALIASES = {"nb": "no", "pt-BR": "pt", "zh-Hans": "zh", "sr-Latn": "sr"}
_MARKUP = re.compile(r"[{}\[\]<>`*|_\\%$]|[^\S ]|://|www\.|&\w+;")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--sentences", type=int, default=800)
    options = parser.parse_args()
    texts = read(options.wheel, options.sentences)
    print("| language | strings | needs | alarms | English | others | loops |\n|---|---|---|---|---|---|---|")
    for language, own in texts.items():
        half = len(own) // 2
        foreign = [line for code, lines in texts.items() if not as_one(code, language) for line in lines[half::20]]
        figures = (
            share(own[half:], language),
            share(texts["en"], language) if language != "en" else float("nan"),
            share(foreign, language),
            sum(map(guards.has_loop, own)) / len(own),
        )
        words = " | ".join(f"{100 * figure:.1f} %" if figure == figure else "" for figure in figures)
        print(f"| {language_name(language)} | {len(own)} | {needed(own[:half], language)} | {words} |", flush=True)


def read(wheel: Path, most: int) -> dict[str, list[str]]:
    """Return up to ``most`` strings of each language that we and the wheel know, in a random order."""
    found: dict[str, dict[tuple[str, ...], str]] = defaultdict(dict)
    with ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            component, _, file = name.partition("/translations/")
            code = file.removesuffix(".json")
            if file.endswith(".json") and is_known(code := ALIASES.get(code, code)):
                found[code].update(leaves(json.loads(archive.read(name)), (component,)))
    shuffle = random.Random(SEED)
    texts = {}
    for code, strings in sorted(found.items()):
        usable = sorted({text for path, text in strings.items() if is_usable(code, path, text, found["en"])})
        if len(usable) >= FEWEST:
            texts[code] = shuffle.sample(usable, min(most, len(usable)))
    return texts


def is_known(code: str) -> bool:
    """Tell whether we and the identifier know a language."""
    try:
        language_name(code)
    except DataError:
        return False
    return languages.is_identifiable(code)


def leaves(tree: Any, path: tuple[str, ...]) -> dict[tuple[str, ...], str]:
    """Return the strings of ``tree`` by their keys."""
    if isinstance(tree, str):
        return {path: tree.strip()}
    return {key: text for name, branch in tree.items() for key, text in leaves(branch, (*path, name)).items()}


def is_usable(code: str, path: tuple[str, ...], text: str, english: dict[tuple[str, ...], str]) -> bool:
    """Tell whether ``text`` is plain, long enough to be judged, and translated at all."""
    if _MARKUP.search(text) or languages.count_letters(text) < languages.MIN_LETTERS:
        return False
    return code == "en" or english.get(path) != text


def as_one(one: str, other: str) -> bool:
    """Tell whether two languages are not told apart."""
    return one == other or any(one in group and other in group for group in languages.CONFUSABLE)


def share(lines: list[str], language: str) -> float:
    """Return the share of ``lines`` that is called another language than ``language``."""
    return sum(languages.is_other_language(line, language) for line in lines) / len(lines)


def needed(lines: list[str], language: str) -> float:
    """Return the smallest certainty with at most 1 % of false alarms in ``lines``, or the largest there is."""
    answers = [languages.identifier().classify(line) for line in lines]
    for certainty in CERTAINTIES:
        alarms = sum(not as_one(found, language) and sure >= certainty for found, sure in answers)
        if alarms <= 0.01 * len(lines):
            return certainty
    return CERTAINTIES[-1]


if __name__ == "__main__":
    main()
