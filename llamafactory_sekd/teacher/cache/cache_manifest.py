"""What a cache says of itself, and the refusal where that is not what a run needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.teacher.cache.formats import DTYPES, Format, HiddenFormat, TopKFormat, read_transform
from llamafactory_sekd.teacher.cache.records import read_json, write_json


MANIFEST = "manifest.json"
VERSION = 1


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
