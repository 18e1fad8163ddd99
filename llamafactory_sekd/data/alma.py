"""``sekd data alma``: ALMA's data as instruction records, validation and test sets, and the names of the data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.alma_source import LICENSE, Source
from llamafactory_sekd.data.checks import Findings, Pair, clean_pairs
from llamafactory_sekd.data.languages import Direction, parse_direction
from llamafactory_sekd.data.products import (
    DATASET_INFO,
    Product,
    check_entries,
    merge_entries,
    plain_files,
    read_manifest,
    same_request,
    verify,
    write_product,
)
from llamafactory_sekd.data.prompts import PARROT, Prompt
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.files import locked


MANIFEST = "manifest.json"
# The languages that ALMA pairs with English, in the order of its paper; the first two are this paper's.
ALMA_LANGUAGES: tuple[str, ...] = ("de", "cs", "is", "ru", "zh")
DEFAULT_LANGUAGES: tuple[str, ...] = ("de", "cs")
DEFAULT_OUT = "data/alma"

# One validation set per pair: this paper's choice for German and Czech, from English for the others. ALMA has none for
# Icelandic, whose WMT21 set is its test set.
VALIDATION: dict[str, Direction] = {
    "de": Direction("en", "de"),
    "cs": Direction("cs", "en"),
    "ru": Direction("en", "ru"),
    "zh": Direction("en", "zh"),
}
VALIDATION_NAME = "wmt21_valid"


@dataclass(frozen=True)
class Plan:
    """What to make: ``languages`` in addition to English, and the chosen ``directions`` between each and English."""

    languages: tuple[str, ...]
    directions: tuple[Direction, ...]

    def of(self, language: str) -> list[Direction]:
        """Return the chosen directions of one pair."""
        return [direction for direction in self.directions if language in (direction.source, direction.target)]

    def validation(self, language: str) -> list[Direction]:
        """Return the directions of ``wmt21_valid``: the fixed one of the pair, or the chosen one if that is not it."""
        chosen = self.of(language) if language in VALIDATION else []
        return [direction for direction in chosen if direction == VALIDATION[language]] or chosen


def make_plan(pairs: Sequence[str], directions: Sequence[str] | None = None) -> Plan:
    """Read the options ``--pairs`` and ``--directions``; raises :class:`ArgumentError` and :class:`DataError`."""
    asked = {_alma_language(pair, "--pairs") for pair in pairs}
    languages = tuple(code for code in ALMA_LANGUAGES if code in asked)
    if not languages:
        raise ArgumentError("--pairs is empty: name at least one of " + _known_pairs() + ".")
    every = [Direction(*sides) for code in languages for sides in (("en", code), (code, "en"))]
    if directions is None:
        return Plan(languages, tuple(every))
    for direction in directions:
        if _alma_language(direction, "--directions") not in languages:
            raise ArgumentError(f"--directions names {direction!r}, which is not among the --pairs {','.join(pairs)}.")
    chosen = tuple(direction for direction in every if str(direction) in directions)
    return Plan(tuple(c for c in languages if any(c in (d.source, d.target) for d in chosen)), chosen)


def prepare_alma(
    source: Source,
    plan: Plan,
    out: Path,
    overwrite: bool = False,
    step: Callable[[str], None] = lambda name: None,
) -> tuple[dict[str, Any], bool]:
    """Make the data in ``out``, or verify what an earlier run made; return the manifest and whether it was made now.

    ``step`` is called with the name of each source file before it is read. Raises :class:`DataError`.
    """
    request = {
        "command": "alma",
        "source": source.request(splits(plan)),
        "directions": [str(direction) for direction in plan.directions],
    }
    with locked(out / ".sekd.lock"):
        manifest = read_manifest(out / MANIFEST)
        fresh = manifest is None or overwrite
        if manifest is not None and not overwrite:
            same_request(out, manifest.get("request"), request)
            verify(out / MANIFEST, manifest)
        else:
            product = build(source, plan, step)
            check_entries(out / DATASET_INFO, _entries(product.files), overwrite)
            manifest = write_product(out / MANIFEST, request, product, overwrite)
        merge_entries(out / DATASET_INFO, _entries(manifest["files"]), overwrite)
        return manifest, fresh


def splits(plan: Plan) -> list[tuple[Direction, str]]:
    """Return the source's files that ``plan`` needs, as (direction, split), in the order in which they are read."""
    wanted: list[tuple[Direction, str]] = []
    for language in plan.languages:
        pair = Direction(language, "en")
        wanted += [(pair, "train")]
        wanted += [(pair, "valid")] if language in VALIDATION else []
        wanted += [(direction, "test") for direction in plan.of(language)]
    return wanted


def build(source: Source, plan: Plan, step: Callable[[str], None]) -> Product:
    """Read, check and format everything in memory; the same source and plan give the same bytes."""
    findings = Findings()
    train: dict[Direction, list[Pair]] = {}
    valid: dict[Direction, list[Pair]] = {}
    test: dict[Direction, list[Pair]] = {}
    for direction, split in splits(plan):
        step(f"{split} {direction}")
        pairs = clean_pairs(source.read(direction, split), findings)
        if split == "test":
            test[direction] = pairs
            continue
        for chosen in plan.of(direction.source):
            oriented = pairs if chosen == direction else [pair.reversed for pair in pairs]
            (train if split == "train" else valid)[chosen] = oriented

    files = _training_files(plan, train) | _validation_files(plan, valid)
    for direction, pairs in test.items():
        files[f"{wmt22_name(direction)}.json"] = alpaca_file({direction: pairs})
        files |= plain_files("wmt22", direction, pairs)
    return Product(files, findings, source.revision(), LICENSE)


def alpaca_file(corpus: dict[Direction, list[Pair]], prompt: Prompt = PARROT) -> tuple[bytes, int]:
    """Return the bytes of a JSON list with one record per line, and the number of records."""
    lines = [
        json.dumps(prompt.record(pair.source, pair.target, direction), ensure_ascii=False)
        for direction, pairs in corpus.items()
        for pair in pairs
    ]
    return ("[\n" + ",\n".join(lines) + "\n]\n").encode("utf-8"), len(lines)


def _training_files(plan: Plan, train: dict[Direction, list[Pair]]) -> dict[str, tuple[bytes, int]]:
    files = {f"{alma_name(d)}.json": alpaca_file({d: pairs}) for d, pairs in train.items()}
    # Its name promises both directions of several pairs.
    if len(plan.languages) > 1 and len(plan.directions) == 2 * len(plan.languages):
        files[f"{joint_alma_name(plan.languages)}.json"] = alpaca_file(train)
    return files


def _validation_files(plan: Plan, valid: dict[Direction, list[Pair]]) -> dict[str, tuple[bytes, int]]:
    files = {f"{wmt21_name(d)}.json": alpaca_file({d: pairs}) for d, pairs in valid.items()}
    joint = [direction for language in plan.languages for direction in plan.validation(language)]
    if joint:
        files[f"{VALIDATION_NAME}.json"] = alpaca_file({d: valid[d] for d in joint})
    for direction, pairs in valid.items():
        files |= plain_files(VALIDATION_NAME, direction, pairs)
    return files


def _alma_language(pair: str, option: str) -> str:
    direction = parse_direction(pair)
    sides = {direction.source, direction.target}
    other = sides - {"en"}
    if "en" not in sides or not other <= set(ALMA_LANGUAGES):
        raise ArgumentError(f"{option} names {pair!r}, which ALMA does not have: use {_known_pairs()}.")
    return other.pop()


def _known_pairs() -> str:
    return ", ".join(f"{code}-en" for code in ALMA_LANGUAGES)


def _entries(files: Iterable[str]) -> dict[str, dict[str, str]]:
    return {Path(name).stem: {"file_name": name} for name in files if name.endswith(".json")}


def alma_name(direction: Direction) -> str:
    """Return the name of a direction's training set: ``alma_en_de``."""
    return f"alma_{direction.slug}"


def joint_alma_name(languages: Sequence[str]) -> str:
    """Return the name of the training set over both directions of every pair: ``alma_en_de_cs``."""
    return "_".join(["alma", "en", *languages])


def wmt21_name(direction: Direction) -> str:
    """Return the name of a direction's validation set: ``wmt21_en_de``."""
    return f"wmt21_{direction.slug}"


def wmt22_name(direction: Direction) -> str:
    """Return the name of a direction's test set: ``wmt22_en_de``."""
    return f"wmt22_{direction.slug}"


def command_for(name: str, directory: Path | str = DEFAULT_OUT) -> str | None:
    """Return the command that makes the data set ``name`` in ``directory``, or None when it is not one of ours."""
    languages = _languages_for(name)
    if languages is None:
        return None
    command = "sekd data alma"
    if languages != DEFAULT_LANGUAGES:
        command += " --pairs " + ",".join(f"{code}-en" for code in languages)
    if Path(directory) != Path(DEFAULT_OUT):
        command += f" --out {directory}"
    return command


def _languages_for(name: str) -> tuple[str, ...] | None:
    """Return the pairs to ask for: exactly those of a joint set, else the usual ones and the one that is missing."""
    if name == VALIDATION_NAME:
        return DEFAULT_LANGUAGES
    for code in ALMA_LANGUAGES:
        for direction in (Direction("en", code), Direction(code, "en")):
            if name in (alma_name(direction), wmt21_name(direction), wmt22_name(direction)):
                return tuple(one for one in ALMA_LANGUAGES if one == code or one in DEFAULT_LANGUAGES)
    joint = tuple(name.removeprefix("alma_en_").split("_"))
    in_order = tuple(code for code in ALMA_LANGUAGES if code in joint)
    return joint if name.startswith("alma_en_") and len(joint) > 1 and joint == in_order else None
