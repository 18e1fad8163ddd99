"""Files that are written whole or not at all, and folders that one run at a time works in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from llamafactory_sekd.errors import DataError, SekdError


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
def locked(
    lock: Path, busy: str | None = None, *, error: type[SekdError] = DataError, wait: bool = False
) -> Iterator[None]:
    """Hold a lock file, in a folder that is made if needed, for the length of the block.

    A second process waits, or gets an ``error`` that says ``busy``.
    """
    folder = lock.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=-1 if wait else 0)
        held.acquire()
    except Timeout:
        raise error(busy or f"Another run is writing to {folder}: wait for it, or choose another one.") from None
    except OSError as failure:
        raise error(f"Cannot write to {folder}: {failure.strerror}.") from failure
    try:
        yield
    finally:
        held.release()
