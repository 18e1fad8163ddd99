"""Files that are written completely or not at all, and folders that one run at a time works in."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from llamafactory_sekd.errors import DataError, SekdError


# A full disk, a quota, the largest file that is allowed; and torch's words for each of them, which hide the system's.
_NO_ROOM = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
_TORCH_CANNOT_WRITE = re.compile(
    r"PytorchStreamWriter failed writing|inline_container\.cc:\d+\] \. unexpected pos|basic_ios::clear: iostream error"
)


def no_room(error: BaseException) -> str:
    """Return the system's words where an error, or one that it comes from, says that nothing more can be written.

    Libraries put the system's error into a text of their own. Empty for every other error.
    """
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return _NO_ROOM[error.errno]
        found = next((words for words in _NO_ROOM.values() if words in str(error)), "")
        if found or _TORCH_CANNOT_WRITE.search(str(error)):
            return found or "torch could not finish a file"
        error = error.__cause__ or error.__context__ or error
    return ""


@contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """Open ``path`` so that no reader, now or after a crash, ever finds a part of what the block writes.

    The temporary name is fixed, so a killed run leaves one hidden ``.partial`` file that the next run replaces. Keep
    two writers apart by :func:`locked`. Where writing fails, the temporary file is removed: on a full disk it would
    keep the disk full.

    Raises:
        DataError: the system refuses.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(f"Cannot write {path}: {error.strerror}.") from error
        raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write ``data`` (text as UTF-8) to ``path``, see :func:`atomic_writer`."""
    with atomic_writer(path) as stream:
        stream.write(data.encode("utf-8") if isinstance(data, str) else data)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write one line of text each, see :func:`atomic_writer`."""
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, see :func:`atomic_writer`."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the parsed file, or None when there is none or it does not parse."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


@contextmanager
def locked(
    lock: Path, busy: str | None = None, *, error: type[SekdError] = DataError, wait: bool = False
) -> Iterator[None]:
    """Hold a lock file, in a folder that is made if needed, for the length of the block.

    A second process waits, or gets an ``error`` with the text ``busy``.
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


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; some file systems cannot, and then the file's own sync has to do."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
