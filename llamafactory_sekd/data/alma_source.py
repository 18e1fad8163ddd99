"""Where ALMA's data comes from: a clone of its repository and the files in it, or the Hugging Face hub."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.checks import Pair
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.readers import json_pairs, pair_from_record, read_json_records, read_lines, read_text_pairs
from llamafactory_sekd.errors import DataError
from llamafactory_sekd.fingerprints import sha256_of


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


def is_alma_direction(direction: Direction) -> bool:
    """Tell whether ALMA has this direction: English is on one side of all its pairs."""
    return "en" in (direction.source, direction.target)


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
