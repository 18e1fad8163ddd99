"""``sekd data alma``: ALMA's data as instruction records, validation and test sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.data import dataset_info
from llamafactory_sekd.data.checks import Findings, Pair, clean_pairs
from llamafactory_sekd.data.data_manifest import Product, read_manifest, same_request, verify, write_product
from llamafactory_sekd.data.dataset_info import ALMA_LANGUAGES, VALIDATION, check_entries, merge_entries
from llamafactory_sekd.data.languages import Direction, parse_direction
from llamafactory_sekd.data.layout import text_files
from llamafactory_sekd.data.prompts import PARROT, Prompt
from llamafactory_sekd.data.sources import LICENSE, Source
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.files import locked


MANIFEST = "manifest.json"
DATASET_INFO = "dataset_info.json"


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
        files[f"{dataset_info.wmt22_name(direction)}.json"] = alpaca_file({direction: pairs})
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
    files = {f"{dataset_info.alma_name(d)}.json": alpaca_file({d: pairs}) for d, pairs in train.items()}
    # Its name promises both directions of several pairs.
    if len(plan.languages) > 1 and len(plan.directions) == 2 * len(plan.languages):
        files[f"{dataset_info.joint_alma_name(plan.languages)}.json"] = alpaca_file(train)
    return files


def _validation_files(plan: Plan, valid: dict[Direction, list[Pair]]) -> dict[str, tuple[bytes, int]]:
    files = {f"{dataset_info.wmt21_name(d)}.json": alpaca_file({d: pairs}) for d, pairs in valid.items()}
    joint = [direction for language in plan.languages for direction in plan.validation(language)]
    if joint:
        files[f"{dataset_info.VALIDATION_NAME}.json"] = alpaca_file({d: valid[d] for d in joint})
    for direction, pairs in valid.items():
        files |= plain_files(dataset_info.VALIDATION_NAME, direction, pairs)
    return files


def plain_files(task: str, direction: Direction, pairs: list[Pair]) -> dict[str, tuple[bytes, int]]:
    """Return a test set in the evaluation's layout: each file's bytes and number of lines."""
    source, target = text_files(Path(task), direction)
    sides = {source: [pair.source for pair in pairs], target: [pair.target for pair in pairs]}
    return {
        path.as_posix(): ("".join(f"{line}\n" for line in lines).encode("utf-8"), len(lines))
        for path, lines in sides.items()
    }


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
