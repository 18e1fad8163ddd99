"""ALMA's data: from a clone of its repository or the hub to instruction records, validation and test sets.

The first half makes what ``sekd data alma`` writes and names it, the second one reads.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from llamafactory_sekd.data.readers import json_pairs, pair_from_record, read_json_records, read_lines, read_text_pairs
from llamafactory_sekd.errors import ArgumentError, DataError
from llamafactory_sekd.files import locked
from llamafactory_sekd.fingerprints import sha256_of


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


# The task's name here, and the split's name in ALMA's files.
TASKS: dict[str, str] = {"wmt22": "test", "wmt21_valid": "valid"}
LICENSE = (
    "Collected by ALMA (https://github.com/fe1ixxu/ALMA, MIT license). The sentences come from the test sets of the "
    "WMT shared tasks and from FLORES-200 (CC BY-SA 4.0), whose own terms apply to them."
)


def alma_root(directory: Path) -> Path:
    """Return the folder that holds ``deen``, ``csen``, …: ``directory`` or its ``human_written_data``."""
    nested = directory / "human_written_data"
    return nested if nested.is_dir() else directory


def alma_stem(direction: Direction, split: str) -> str:
    """Return the file's path under :func:`alma_root` without its suffix.

    ALMA tests each direction on its own file; training and validation share one file per pair, named ``X-en``.
    """
    other = direction.source if direction.target == "en" else direction.target
    shown = direction if split == "test" else f"{other}-en"
    return f"{other}en/{split}.{shown}"


def alma_files(root: Path, direction: Direction, split: str) -> list[Path]:
    """Return the existing file (JSON) or pair of files (plain text, which some pairs have instead); may be empty."""
    stem = alma_stem(direction, split)
    json_file = root / f"{stem}.json"
    if json_file.is_file():
        return [json_file]
    texts = [root / f"{stem}.{code}" for code in (direction.source, direction.target)]
    return texts if all(path.is_file() for path in texts) else []


def read_alma(root: Path, direction: Direction, split: str) -> list[Pair]:
    """Read one split in one direction; names in reports are relative to ``root``. Raises :class:`DataError`."""
    files = alma_files(root, direction, split)
    if not files:
        raise DataError(f"{root / alma_stem(direction, split)}.json not found: is {root} a clone of ALMA's data?")
    names = [path.relative_to(root).as_posix() for path in files]
    if len(files) == 1:
        return list(json_pairs(files[0], direction, names[0]))
    return read_text_pairs(files[0], files[1], (names[0], names[1]))


def alma_documents(root: Path, direction: Direction, split: str) -> tuple[str, ...]:
    """Return the name of each line's document; none where nothing names them.

    They are in a file ``….docid`` next to ALMA's, one name per line, or in the field ``doc`` of its records.
    """
    names = root / f"{alma_stem(direction, split)}.docid"
    if names.is_file():
        return tuple(" ".join(line.split()) for line in read_lines(names))
    files = alma_files(root, direction, split)
    if len(files) != 1:
        return ()
    found = tuple(str(record.get("doc") or "") for _, record in read_json_records(files[0]))
    return found if any(found) else ()


class DirectorySource:
    """A clone of ALMA's repository, or a folder with its ``deen``, ``csen`` and so on."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise DataError(f"--source {directory} is not a directory: give a clone of ALMA's repository, or `hub`.")
        self.directory = directory
        self.root = alma_root(directory)

    def read(self, direction: Direction, split: str) -> list[Pair]:
        """Return the pairs of a direction and a split."""
        return read_alma(self.root, direction, split)

    def request(self, wanted: list[tuple[Direction, str]]) -> dict[str, Any]:
        """Return what identifies the files that ``wanted`` needs before they are read: their hashes."""
        files: list[Path] = []
        for direction, split in wanted:
            found = alma_files(self.root, direction, split)
            if not found:
                raise DataError(f"{self.root / alma_stem(direction, split)}.json not found: is it a clone of ALMA?")
            files += found
        return {
            "kind": "directory",
            "files": {path.relative_to(self.root).as_posix(): sha256_of(path) for path in files},
        }

    def revision(self) -> dict[str, Any]:
        """Return what the manifest records of the source's version."""
        return {"kind": "directory", "revision": _git_revision(self.directory)}


class HubSource:
    """The two data sets of ALMA's author on the Hugging Face hub, through ``datasets.load_dataset``."""

    def __init__(self, train: str = "haoranxu/ALMA-Human-Parallel", test: str = "haoranxu/WMT22-Test") -> None:
        self.train = train
        self.test = test
        self.revisions: dict[str, str | None] = {train: None, test: None}

    def read(self, direction: Direction, split: str) -> list[Pair]:
        """Return the pairs of a direction and a split."""
        other = direction.source if direction.target == "en" else direction.target
        if split == "test":
            # The test sets keep the pair in a column named like the configuration.
            return self._load(self.test, str(direction), "test", str(direction), direction)
        hub_split = {"train": "train", "valid": "validation"}[split]
        return self._load(self.train, f"{other}-en", hub_split, "translation", direction)

    def request(self, wanted: list[tuple[Direction, str]]) -> dict[str, Any]:
        """Return what the manifest records of the files that ``wanted`` needs."""
        return {"kind": "hub", "repositories": [self.train, self.test]}

    def revision(self) -> dict[str, Any]:
        """Return what the manifest records of the source's version."""
        return {"kind": "hub", "revision": self.revisions}

    def _load(self, repository: str, config: str, split: str, column: str, direction: Direction) -> list[Pair]:
        from datasets import load_dataset

        name = f"{repository}/{config}/{split}"
        try:
            dataset = load_dataset(repository, config, split=split)
        except Exception as error:  # the hub client raises whatever its transport raises
            reason = str(error).strip().split("\n")[0]
            raise DataError(
                f"Cannot load {name} from the Hugging Face hub ({type(error).__name__}: {reason}); with a clone of "
                "https://github.com/fe1ixxu/ALMA, use --source DIR."
            ) from error
        self.revisions[repository] = _hub_revision(dataset.info.download_checksums) or self.revisions[repository]
        return [pair_from_record(row, column, direction, name, number) for number, row in enumerate(dataset, start=1)]


# Gives ALMA's splits (`train`, `valid`, `test`) in a direction.
Source = DirectorySource | HubSource


def _hub_revision(checksums: dict[str, Any] | None) -> str | None:
    """Take the commit out of the addresses that ``datasets`` loaded: ``hf://datasets/owner/name@commit/file``."""
    for address in checksums or ():
        if match := re.search(r"@([0-9a-f]{40})(?:/|$)", address):
            return match[1]
    return None


def _git_revision(directory: Path) -> str | None:
    """Return the commit of the clone that ``directory`` is, or whose data folder it is; None when it is neither."""
    command = ["git", "-C", str(directory), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.splitlines()
    if answer.returncode != 0 or len(lines) != 2:
        return None
    # A copy inside another repository has no revision of its own.
    resolved = directory.resolve()
    return lines[1] if Path(lines[0]) in (resolved, resolved.parent) else None
