"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from llamafactory_sekd.errors import DataError


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that no reader, now or after a crash, ever finds a part of it.

    The temporary name is fixed, so a killed run leaves one hidden ``.partial`` file that the next run replaces. Two
    writers must be kept apart by :func:`locked`. Raises :class:`DataError` where the system refuses.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror}.") from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes; :class:`DataError` when it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold ``directory`` (made if needed) for one writer; a second one gets a :class:`DataError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".sekd.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise DataError(f"Another run is writing to {directory}: wait for it or choose another --out.") from None
    except OSError as error:
        raise DataError(f"Cannot write to {directory}: {error.strerror}.") from error
    try:
        yield
    finally:
        lock.release()
