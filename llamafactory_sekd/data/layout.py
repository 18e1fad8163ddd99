"""Where ALMA's repository keeps which file, and where ours go."""

from __future__ import annotations

from pathlib import Path

from llamafactory_sekd.data.checks import Pair
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.readers import read_json_pairs, read_json_records, read_lines, read_text_pairs
from llamafactory_sekd.errors import DataError


# The task's name here, and the split's name in ALMA's files.
TASKS: dict[str, str] = {"wmt22": "test", "wmt21_valid": "valid"}


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
        return read_json_pairs(files[0], direction, names[0])
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


def text_files(directory: Path, direction: Direction) -> tuple[Path, Path]:
    """Return the plain text test set of ``direction``: ``en-de.en`` and ``en-de.de`` in ``directory``."""
    return directory / f"{direction}.{direction.source}", directory / f"{direction}.{direction.target}"
