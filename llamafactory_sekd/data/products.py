"""What a command makes of parallel text: large files, the manifest, the declaration to LLaMA-Factory.

The manifest says what was made, from what, and how to see that it is still complete.

It is written last, so its presence says that a run was finished. Its keys:

``request``
    what was asked for, the hashes of local source files included; another request is another data set.
``source``
    kind and revision of the source; ``licence``: a note on it.
``files``
    for each file, relative to the manifest: ``records`` (pairs), ``bytes`` and ``sha256``.
``findings``
    what was left out, kept or repaired: problem, outcome, file, count, and the first thousand lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import llamafactory_sekd
from llamafactory_sekd.config import peek
from llamafactory_sekd.data.checks import Findings, Pair
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.errors import DataError, one_line
from llamafactory_sekd.files import read_json, write_atomic, write_json
from llamafactory_sekd.fingerprints import growing_sha256, sha256, sha256_of


FORMAT = 1
DATASET_INFO = "dataset_info.json"
_TRAINING_TEXT = "training_text.json"
# The host's web UI leaves the first next to the model, a study the second one folder up.
_CONFIGURATIONS = ("training_args.yaml", "train.yaml")


@dataclass(frozen=True)
class Written:
    """A complete file that still has its temporary name."""

    partial: Path
    size: int
    sha256: str


class ResumableFile:
    """Grows under a temporary name, next to notes of how far it is complete; see :func:`files.locked` for two writers.

    A killed run leaves both, and the next one with the same request continues there. On an error, a full disk for one,
    both are removed.

    Args:
        path: the file's name once it is complete.
        request: what makes the content; notes of another request count for nothing.

    Attributes:
        noted: what :meth:`note` was given last, by this or an earlier run; empty at the beginning.
    """

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self.notes = path.with_name(f".{path.name}.progress.json")
        self.noted: dict[str, Any] = {}
        self._request = request
        self._hash = growing_sha256()
        self._size = 0
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> ResumableFile:
        found = read_json(self.notes)
        if isinstance(found, dict) and found.get("request") == self._request:
            if not self.partial.exists() and self.path.exists() and self.path.stat().st_size == found["size"]:
                self.path.replace(self.partial)  # the run ended between the file's last name and the manifest
            if self.partial.exists() and self.partial.stat().st_size >= found["size"]:
                self.noted, self._size = found["noted"], found["size"]

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(self.partial, "r+b" if self._size else "wb")
            self._stream.truncate(self._size)
            while block := self._stream.read(1 << 20) if self._size else b"":
                self._hash.update(block)
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._stream is not None
        with suppress(OSError):  # of what a full disk has not taken
            self._stream.close()
        if kind is not None and issubclass(kind, Exception):
            self.discard()

    def write(self, data: bytes) -> None:
        """Append; :class:`DataError` where the system refuses."""
        assert self._stream is not None
        try:
            self._stream.write(data)
        except OSError as error:
            raise self._failed(error) from error
        self._hash.update(data)
        self._size += len(data)

    def note(self, noted: dict[str, Any]) -> None:
        """Write down how far the file is complete, with what the next run needs to go on."""
        self._sync()
        write_json(self.notes, {"request": self._request, "size": self._size, "noted": noted})

    def finish(self, noted: dict[str, Any]) -> Written:
        """Return the complete file, which keeps its temporary name and its notes until the manifest is written."""
        self.note(noted)
        return Written(self.partial, self._size, self._hash.hexdigest())

    def discard(self) -> None:
        """Remove what is temporary."""
        for path in (self.partial, self.notes):
            path.unlink(missing_ok=True)

    def _sync(self) -> None:
        assert self._stream is not None
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> DataError:
        return DataError(f"Cannot write {self.path}: {error.strerror}.")


@dataclass(frozen=True)
class Product:
    """What a run makes: for each relative path its bytes, or where they were written, and its number of pairs."""

    files: Mapping[str, tuple[bytes | Written, int]]
    findings: Findings
    source: dict[str, Any] = field(default_factory=dict)
    licence: str = ""


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return the manifest, or None where there is none; :class:`DataError` when it is not one of ours."""
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"Cannot read the manifest {path} ({one_line(str(error))}): delete it to write the data again."
        ) from error
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("files"), dict)
    ):
        raise DataError(f"{path} is not a manifest of this version: delete it to write the data again.")
    return manifest


def same_request(out: Path, made: Any, asked: dict[str, Any]) -> None:
    """Raise :class:`DataError` when what a manifest says was asked for is not what is asked for now."""
    if made == asked:
        return
    before = made if isinstance(made, dict) else {}
    differing = [key for key in asked | before if key not in asked or before.get(key) != asked[key]]
    raise DataError(
        f"{out} was created with different options ({', '.join(differing)}): "
        "add --overwrite to write it again, or choose another --out."
    )


def verify(path: Path, manifest: dict[str, Any]) -> None:
    """Compare every file that the manifest at ``path`` names with its hash; the first difference is an error.

    A name that leads out of the manifest's directory is refused. Raises :class:`DataError`.
    """
    for name, entry in manifest["files"].items():
        file = inside(path.parent, name)
        if not file.is_file():
            raise DataError(f"{file} is missing although {path} names it: add --overwrite to write the data again.")
        if not isinstance(entry, dict) or sha256_of(file) != entry.get("sha256"):
            raise DataError(
                f"{file} was changed after it was written (its SHA-256 is not the one in {path}): "
                "add --overwrite to write the data again, or choose another --out."
            )


def write_product(path: Path, request: dict[str, Any], product: Product, overwrite: bool) -> dict[str, Any]:
    """Write the files, then the manifest at ``path``; return the manifest.

    A file that is there already with the same content (from a run that was killed) is left alone. One with other
    content is an error, and nothing is written, unless ``overwrite`` is set; then the files of the former manifest
    that are no longer wanted go too. Raises :class:`DataError`.
    """
    directory = path.parent
    wanted = {inside(directory, name): data for name, (data, _) in product.files.items()}
    to_write = {file: data for file, data in wanted.items() if not _holds(file, data)}
    for file in to_write:
        if file.exists() and not overwrite:
            raise DataError(
                f"{file} exists with other content: add --overwrite to replace it, or choose another --out."
            )

    former = read_manifest(path)
    for name in former["files"] if former else ():
        if (file := inside(directory, name)) not in wanted:
            file.unlink(missing_ok=True)
    path.unlink(missing_ok=True)  # from here to the end, the data is incomplete
    for file, data in to_write.items():
        if isinstance(data, Written):
            data.partial.replace(file)
        else:
            write_atomic(file, data)

    manifest = _manifest(request, product)
    write_json(path, manifest)
    return manifest


def inside(directory: Path, name: str) -> Path:
    """Return ``directory / name``; :class:`DataError` when ``..``, an absolute path or a link leads outside."""
    pure = PurePosixPath(name)
    file = directory / pure
    if pure.is_absolute() or ".." in pure.parts or not file.resolve().is_relative_to(directory.resolve()):
        raise DataError(f"The file name {name!r} in the manifest leads out of {directory}: the manifest is not ours.")
    return file


def _holds(file: Path, data: bytes | Written) -> bool:
    size, digest = _measures(data)
    return file.is_file() and file.stat().st_size == size and sha256_of(file) == digest


def _measures(data: bytes | Written) -> tuple[int, str]:
    if isinstance(data, Written):
        return data.size, data.sha256
    return len(data), sha256(data)


def _manifest(request: dict[str, Any], product: Product) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "made_by": f"llamafactory-sekd {llamafactory_sekd.__version__}",
        "request": request,
        "source": product.source,
        "licence": product.licence,
        "files": {
            name: {"records": records, **dict(zip(("bytes", "sha256"), _measures(data), strict=True))}
            for name, (data, records) in product.files.items()
        },
        "findings": product.findings.as_json(),
    }


def merge_entries(path: Path, entries: Mapping[str, Mapping[str, str]], overwrite: bool = False) -> bool:
    """Add ``entries`` to the ``dataset_info.json`` at ``path``; return whether it had to be written.

    Everything else in the file stays. An entry of the same name with another value is an error unless ``overwrite`` is
    set. Raises :class:`DataError`; see :func:`check_entries` to learn of a conflict before other files are written.
    """
    info = check_entries(path, entries, overwrite)
    merged = {**info, **{name: dict(entry) for name, entry in entries.items()}}
    if merged == info:
        return False
    write_json(path, merged)
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


def text_files(directory: Path, direction: Direction) -> tuple[Path, Path]:
    """Return the plain text test set of ``direction``: ``en-de.en`` and ``en-de.de`` in ``directory``."""
    return directory / f"{direction}.{direction.source}", directory / f"{direction}.{direction.target}"


def plain_files(task: str, direction: Direction, pairs: list[Pair]) -> dict[str, tuple[bytes, int]]:
    """Return a test set in the evaluation's layout: each file's bytes and number of lines."""
    source, target = text_files(Path(task), direction)
    sides = {source: [pair.source for pair in pairs], target: [pair.target for pair in pairs]}
    return {
        path.as_posix(): ("".join(f"{line}\n" for line in lines).encode("utf-8"), len(lines))
        for path, lines in sides.items()
    }


def choosing_metrics(dataset_dir: Path, names: list[str]) -> dict[str, str]:
    """Return, for each data set whose text a metric chose, the metric's signature, from the data set's manifest."""
    info = read_json(dataset_dir / "dataset_info.json")
    found = {}
    for name in names:
        entry = info.get(name) if isinstance(info, dict) else None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            continue
        data = dataset_dir / entry["file_name"]
        manifest = read_json(data.with_name(f"{data.stem}.manifest.json"))
        request = manifest.get("request") if isinstance(manifest, dict) else None
        if isinstance(request, dict) and request.get("chosen_by"):
            found[name] = str(request["chosen_by"])
    return found


def record_training_text(output_dir: Path, dataset_dir: Path, names: list[str]) -> None:
    """Leave next to a model which metrics chose its text; nothing where none did."""
    found = choosing_metrics(dataset_dir, names)
    if found:
        write_json(output_dir / _TRAINING_TEXT, found)


def metrics_of_model(folder: Path) -> dict[str, str]:
    """Return the metrics that chose the training text of the model in ``folder``, by the data set's name."""
    found: dict[str, str] = {}
    for place in (folder, folder.parent):
        recorded = read_json(place / _TRAINING_TEXT)
        if isinstance(recorded, dict):
            found |= recorded
        for config in (peek(place / name) for name in _CONFIGURATIONS):
            names = config.get("dataset")
            listed = names.split(",") if isinstance(names, str) else names if isinstance(names, list) else []
            found |= choosing_metrics(Path(str(config.get("dataset_dir", "data"))), [str(n).strip() for n in listed])
    return found
