"""What a cache says of itself; it is opened only where that is what a run needs and its files are intact."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.fingerprints import computing_software
from llamafactory_sekd.teacher.cache.formats import DTYPES, Format, HiddenFormat, TopKFormat, read_transform
from llamafactory_sekd.teacher.cache.record_store import (
    damage,
    damaged_shards,
    drop_shards,
    listed_shards,
    read_json,
    write_json,
)


logger = logging.getLogger(__name__)

MANIFEST, HEAD = "manifest.json", "head.safetensors"
VERSION = 1
# Reading less than this takes no time that anybody would want to watch.
_SHOW_PROGRESS_FROM = 2**30
_TRAIN_REMEDY = "train with the values of the cache, or build another cache with this YAML"
_ADD_REMEDY = "use the same, or build another cache in another folder"


@dataclass(frozen=True)
class Manifest:
    """The first file of a cache, written before any other and never changed.

    Attributes:
        format: ``hidden`` or ``topk``.
        dtype: of the hidden states, or of the log-probabilities.
        vocab_size: rows of the head (``hidden``), or ids that probabilities were taken over (``topk``).
        width: of the teacher (``hidden``).
        k: probabilities per token (``topk``).
        head: file, size and checksum of the teacher's head (``hidden``).
        data: what decides the token ids of an example: tokenizer, template, cut-off, masking. Checked by every run.
        teacher: what decides the teacher's answers: weights, adapters, quantization, type. Checked where it is known.
        software: versions that the records were computed with. Checked before records are added.
        transform: what the teacher does to the products of its head, ``scale`` and ``cap``; None for nothing, as for
            caches that 0.1.0 wrote (``hidden``).
        version: of this layout.
    """

    format: str
    dtype: str
    vocab_size: int
    width: int | None = None
    k: int | None = None
    head: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    software: dict[str, Any] = field(default_factory=dict)
    transform: dict[str, Any] | None = None
    version: int = VERSION

    def save(self, directory: Path) -> None:
        """Write it; :class:`TeacherError` where the system refuses."""
        content = asdict(self)
        if self.transform is None:  # 0.1.0 knows no such field, and reads what it can do right
            del content["transform"]
        write_json(directory / MANIFEST, content)

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read the manifest of a cache.

        Raises:
            TeacherError: there is none, it is damaged, or of another version.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise TeacherError(
                f"`teacher_cache: {directory}` holds no {MANIFEST}: build it with "
                f"`sekd cache X.yaml --out {directory}`, or name the teacher under `teacher_model` as "
                "well, to fill it while training."
            )
        content = read_json(path)
        known = {item.name for item in fields(cls)}
        if content.get("version") != VERSION or set(content) | {"transform"} != known:
            raise TeacherError(
                f"`teacher_cache: {directory}` has the layout {content.get('version')} and this version reads "
                f"{VERSION}: build it again."
            )
        return cls(**content)

    def kept(self) -> Format:
        """Return the format with its settings."""
        if self.format == HiddenFormat.name:
            return HiddenFormat(int(self.width or 0), DTYPES[self.dtype], read_transform(self.transform))
        return TopKFormat(int(self.k or 0), DTYPES[self.dtype], self.vocab_size)

    def check(self, directory: Path, part: str, wanted: dict[str, Any], remedy: str) -> None:
        """Compare one part with what a run needs.

        Args:
            directory: of the cache, for the message.
            part: ``data``, ``teacher`` or ``software``.
            wanted: the same fields, as this run has them.
            remedy: the end of the message.

        Raises:
            TeacherError: a field differs; the message has both values.
        """
        ours = getattr(self, part)
        for name, value in wanted.items():
            if ours.get(name) != value:
                raise TeacherError(
                    f"`teacher_cache: {directory}` was built with {name} {_show(ours.get(name))} and this run has "
                    f"{name} {_show(value)}: {remedy}."
                )


def _show(value: Any) -> str:
    return f"`{value}`" if value is not None else "none"


@dataclass(frozen=True)
class Settings:
    """What a cache is to keep.

    Attributes:
        format: ``hidden`` or ``topk``.
        dtype: a key of ``DTYPES``; None for the teacher's own (``hidden``) or float16 (``topk``).
        k: probabilities per token, for ``topk``.
    """

    format: str = HiddenFormat.name
    dtype: str | None = None
    k: int = 64

    def manifest(self, *, vocab_size: int, rows: int, width: int, computed_in: torch.dtype, **more: Any) -> Manifest:
        """Return the manifest of a new cache.

        Args:
            vocab_size: ids that the tokenizer uses.
            rows: of the teacher's head.
            width: of the teacher.
            computed_in: the type of its head's products.
            more: the parts ``data``, ``teacher``, ``software``, and ``head``.

        Raises:
            TeacherError: the teacher's head has no row for some id.
            ArgumentError: `k` is out of range.
        """
        if rows < vocab_size:
            raise TeacherError(f"the teacher's head has {rows:,} rows and the tokenizer uses {vocab_size:,} ids.")
        if self.format == TopKFormat.name:
            manifest = Manifest(self.format, self.dtype or "float16", vocab_size, k=self.k, **more)
        else:
            own = next((name for name, dtype in DTYPES.items() if dtype == computed_in), "float32")
            manifest = Manifest(self.format, self.dtype or own, rows, width=width, **more)

        manifest.kept()  # checks k
        return manifest


@dataclass(frozen=True)
class Fingerprints:
    """What a run has, to be compared with what the cache was built with.

    Attributes:
        data: see :class:`Manifest`.
        teacher: the same, as a function, because reading a large model's files takes a while; None where the run has
            no teacher.
    """

    data: dict[str, Any]
    teacher: Callable[[], dict[str, Any]] | None = None
    software: dict[str, Any] = field(default_factory=computing_software)


def open_for_reading(directory: Path, run: Fingerprints, *, verify: bool) -> Manifest:
    """Open a cache that this run only reads.

    Args:
        directory: of the cache.
        run: this run's fingerprints; the teacher's are compared where it has one.
        verify: read every file and compare checksums; one rank is enough.

    Raises:
        TeacherError: it is not a cache, was built with something else, or a file is damaged.
    """
    manifest = Manifest.load(directory)
    manifest.check(directory, "data", run.data, _TRAIN_REMEDY)
    if verify:
        if run.teacher is not None:
            manifest.check(directory, "teacher", run.teacher(), _TRAIN_REMEDY)

        complaints = [head_damage(directory, manifest), *_damaged(directory).values()]
        for complaint in filter(None, complaints):
            raise TeacherError(f"{complaint}: run `sekd cache` with this YAML again, it replaces what is damaged.")

    return manifest


def open_for_writing(directory: Path, run: Fingerprints, settings: Settings | None = None) -> Manifest | None:
    """Open a cache that this run adds to, None where there is none yet; damaged shards are dropped with a warning.

    Args:
        directory: of the cache, locked by the caller.
        run: this run's fingerprints.
        settings: what the user asked for, None for whatever the cache keeps.

    Raises:
        TeacherError: it was built with something else.
    """
    if not (directory / MANIFEST).is_file():
        drop_shards(directory, {path.name for path in directory.glob("shard-*")})
        for path in directory.glob("index-*.json"):
            path.unlink()
        return None
    manifest = Manifest.load(directory)
    if settings is not None:
        _check_settings(directory, manifest, settings)

    manifest.check(directory, "data", run.data, _ADD_REMEDY)
    manifest.check(directory, "software", run.software, _ADD_REMEDY)
    if run.teacher is not None:
        manifest.check(directory, "teacher", run.teacher(), _ADD_REMEDY)

    damaged = _damaged(directory)
    for words in damaged.values():
        logger.warning("%s: its examples are computed again.", words)

    drop_shards(directory, set(damaged))
    return manifest


def _check_settings(directory: Path, manifest: Manifest, settings: Settings) -> None:
    wanted = {"format": settings.format, "dtype": settings.dtype or manifest.dtype}
    if settings.format == TopKFormat.name:
        wanted["k"] = str(settings.k)

    for name, value in wanted.items():
        found = str(getattr(manifest, name))
        if found != value:
            raise TeacherError(
                f"`--out {directory}` holds a cache with {name} `{found}`, not `{value}`: {_ADD_REMEDY}."
            )


def head_damage(directory: Path, manifest: Manifest) -> str | None:
    """Return what is wrong with the teacher's head, None where nothing is or none is kept."""
    return None if manifest.head is None else damage(directory, manifest.head)


def _damaged(directory: Path) -> dict[str, str]:
    total = sum(entry["bytes"] for entry in listed_shards(directory))
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="Checking the cache", disable=total < _SHOW_PROGRESS_FROM
    ) as bar:
        return damaged_shards(directory, lambda size: bar.update(size) and None)
