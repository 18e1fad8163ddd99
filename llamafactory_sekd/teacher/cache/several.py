"""The caches of one run: each is a teacher, and an example is answered by the one that holds it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.teacher.cache.cache_manifest import Manifest
from llamafactory_sekd.teacher.cache.formats import Format
from llamafactory_sekd.teacher.cache.record_store import Key, ShardReader
from llamafactory_sekd.teacher.cache.segments import Segment, segments


# Of an example's text, in a message of one line.
_SHOWN = 120


@dataclass(frozen=True)
class OpenCache:
    """A cache that a run reads.

    Attributes:
        directory: its folder.
        name: of its teacher, in the metrics.
        kept: its format.
        vocab_size: how many ids its teacher's answers are over.
        reader: of its records.
    """

    directory: Path
    name: str
    kept: Format
    vocab_size: int
    reader: ShardReader


def names_of(directories: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart, their parts joined by hyphens."""
    parts = [path.absolute().parts for path in directories]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["-".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names

    raise TeacherError(f"`teacher_cache: {','.join(map(str, directories))}` names a folder twice: remove one.")


def open_caches(directories: Sequence[Path], manifests: Sequence[Manifest]) -> list[OpenCache]:
    """Open caches that were checked, by their manifests; :class:`TeacherError` where a folder is named twice."""
    return [
        OpenCache(directory, name, manifest.kept(), manifest.vocab_size, ShardReader(directory))
        for directory, name, manifest in zip(directories, names_of(directories), manifests, strict=True)
    ]


def first_unanswered(
    datasets: Sequence[Any], known: Sequence[Container[Key]], *, mixes: bool = False
) -> tuple[Segment, list[int]] | None:
    """Return the first segment that no cache holds, or several do, with the numbers of those; None for none.

    Args:
        datasets: of tokenized examples.
        known: the keys of each cache.
        mixes: whether several answers are allowed.
    """
    for dataset in datasets:
        for example in dataset:
            for segment in segments(example):
                key = segment.key()
                holders = [number for number, keys in enumerate(known) if key in keys]
                if not holders or (len(holders) > 1 and not mixes):
                    return segment, holders

    return None


def unanswered(directories: Sequence[Path], holders: Sequence[int], text: str) -> str:
    """Return the message for an example that no cache holds, or several do.

    Args:
        directories: of the run's caches.
        holders: the numbers of those that hold it.
        text: of the example.
    """
    text = " ".join(text.split())
    shown = repr(text if len(text) <= _SHOWN else f"… {text[-_SHOWN:]}")
    if len(holders) > 1:
        names = " and ".join(f"`{directories[number]}`" for number in holders)
        return (
            f"`teacher_cache`: {names} hold the example {shown}, and each would answer it: set `teacher_mix: mean` to "
            "train on the mean of their distributions, or name one of them."
        )

    remedy = (
        "or name the teacher under `teacher_model` as well" if len(directories) == 1 else "into one of the folders"
    )
    return (
        f"`teacher_cache: {','.join(map(str, directories))}` lacks the example {shown}: run `sekd cache` with this "
        f"YAML to add what is missing, {remedy}."
    )
