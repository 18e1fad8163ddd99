"""A large file that is written over as many runs as it takes, and appears when it is complete."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llamafactory_sekd.errors import DataError
from llamafactory_sekd.files import read_json, write_json
from llamafactory_sekd.fingerprints import growing_sha256


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
