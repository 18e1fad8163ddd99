"""The names of our data sets in LLaMA-Factory's ``dataset_info.json``, and which command makes each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.errors import DataError, one_line
from llamafactory_sekd.files import write_atomic


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


def shipped_entries() -> dict[str, dict[str, str]]:
    """Return the content of the project's ``data/dataset_info.json``: all that ``sekd data alma`` can make."""
    both = [pair for code in ALMA_LANGUAGES for pair in (Direction("en", code), Direction(code, "en"))]
    names = [joint_alma_name(DEFAULT_LANGUAGES), joint_alma_name(ALMA_LANGUAGES)]
    names += [alma_name(direction) for direction in both]
    names += [VALIDATION_NAME]
    names += [wmt21_name(d) for d in both if {d.source, d.target} & set(VALIDATION)]
    names += [wmt22_name(direction) for direction in both]
    return {name: {"file_name": f"alma/{name}.json"} for name in names}


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


def merge_entries(path: Path, entries: Mapping[str, Mapping[str, str]], overwrite: bool = False) -> bool:
    """Add ``entries`` to the ``dataset_info.json`` at ``path``; return whether it had to be written.

    Everything else in the file stays. An entry of the same name with another value is an error unless ``overwrite`` is
    set. Raises :class:`DataError`; see :func:`check_entries` to learn of a conflict before other files are written.
    """
    info = check_entries(path, entries, overwrite)
    merged = {**info, **{name: dict(entry) for name, entry in entries.items()}}
    if merged == info:
        return False
    write_atomic(path, json.dumps(merged, ensure_ascii=False, indent=2).encode("utf-8") + b"\n")
    return True


def check_entries(path: Path, entries: Mapping[str, Mapping[str, str]], overwrite: bool = False) -> dict[str, Any]:
    """Return what the file at ``path`` holds, nothing if there is none; raises as :func:`merge_entries` does."""
    if not path.exists():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path} ({one_line(str(error))}): fix it, or choose another --out.") from error
    if not isinstance(info, dict):
        raise DataError(f"{path} holds no JSON object: fix it, or choose another --out.")
    for name, entry in entries.items():
        if name in info and info[name] != dict(entry) and not overwrite:
            raise DataError(
                f"{path} declares another data set {name!r}: choose another name or --out, or add --overwrite."
            )
    return info
