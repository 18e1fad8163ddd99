"""Records by key: shards of tensors on disk, an index per writing rank, and memory-mapped reading.

A shard is a safetensors file that holds the records of some examples one after the other, their keys
``[examples, 2]`` and their offsets ``[examples + 1]``. A rank lists a shard in its own ``index-<rank>.json`` once the
shard is complete; what no index lists does not exist. So ranks never write to one file, and a killed run loses what it
had not listed. Every file appears complete or not at all, and a checksum tells whether it has changed since.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from llamafactory_sekd.errors import DataError, TeacherError, one_line
from llamafactory_sekd.files import write_atomic
from llamafactory_sekd.fingerprints import xxh3, xxh3_of, xxh3_of_json
from llamafactory_sekd.teacher.cache.segments import Key


Record = dict[str, torch.Tensor]

# Large enough for one sequential write, small enough that a kill costs little and a batch of shards needs no memory.
SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 300.0
_DIRECTORY = {"keys", "offsets"}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write a safetensors file and return its entry for an index: name, size and checksum."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    _write(path, data)
    return {"file": path.name, "bytes": len(data), "xxh3": xxh3(data)}


def damage(directory: Path, entry: dict[str, Any]) -> str | None:
    """Return what is wrong with a file that an index lists, None where nothing is."""
    path = directory / entry["file"]
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path} has {size:,} bytes instead of {entry['bytes']:,}"
    return None if xxh3_of(path) == entry["xxh3"] else f"{path} does not match its checksum"


def write_json(path: Path, content: Any) -> None:
    """Write JSON together with its checksum."""
    text = json.dumps({"xxh3": xxh3_of_json(content), "content": content}, indent=1, ensure_ascii=False)
    _write(path, text.encode())


def read_json(path: Path) -> Any:
    """Read what :func:`write_json` wrote.

    Raises:
        TeacherError: it cannot be read, or is not what was written.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        content = document["content"]
        intact = document["xxh3"] == xxh3_of_json(content)
    except (OSError, ValueError, KeyError, TypeError):
        intact = False

    if not intact:
        raise TeacherError(f"{path} is damaged: delete it and run `sekd cache` again.")
    return content


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except DataError as error:
        raise TeacherError(
            f"{str(error).rstrip('.')}: make room there and run the same command again to resume."
        ) from error


class ShardWriter:
    """Collects the records of one rank and writes them out shard by shard.

    Args:
        directory: of the cache; one writer per rank, kept apart from other runs by the caller's lock.
        rank: of this process.
        shard_bytes, shard_seconds: a shard is written when it holds so much, or when so much time has passed.
    """

    def __init__(
        self, directory: Path, rank: int, *, shard_bytes: int = SHARD_BYTES, shard_seconds: float = SHARD_SECONDS
    ) -> None:
        self.directory = directory
        self.rank = rank
        self.shard_bytes = shard_bytes
        self.shard_seconds = shard_seconds
        path = _index_path(directory, rank)
        self.listed: list[dict[str, Any]] = read_json(path)["shards"] if path.is_file() else []
        self._clear()

    def __contains__(self, key: object) -> bool:
        return key in self.waiting

    def add(self, key: Key, record: Record) -> None:
        """Take in one example: tensors ``[tokens, ...]`` on any device, which are copied.

        Raises:
            TeacherError: a shard is due and cannot be written.
        """
        self.waiting[key] = {name: tensor.detach().to("cpu", copy=True) for name, tensor in record.items()}
        self.bytes += sum(tensor.nbytes for tensor in self.waiting[key].values())
        if self.bytes >= self.shard_bytes or time.monotonic() - self.since >= self.shard_seconds:
            self.flush()

    def flush(self) -> bool:
        """Write what waits and list it; returns whether there was anything."""
        if not self.waiting:
            return False
        records = list(self.waiting.values())
        lengths = [len(next(iter(record.values()))) for record in records]
        tensors = {name: torch.cat([record[name] for record in records]) for name in records[0]}
        tensors["keys"] = torch.tensor(list(self.waiting), dtype=torch.int64)
        tensors["offsets"] = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)
        number = 1 + max((entry["number"] for entry in self.listed), default=-1)
        entry = write_tensors(self.directory / f"shard-{self.rank:05d}-{number:05d}.safetensors", tensors)
        self.listed.append({**entry, "number": number, "examples": len(records), "tokens": sum(lengths)})
        write_json(_index_path(self.directory, self.rank), {"shards": self.listed})
        self._clear()
        return True

    def _clear(self) -> None:
        self.waiting: dict[Key, Record] = {}
        self.bytes = 0
        self.since = time.monotonic()


class ShardReader:
    """Finds and reads records; holds 32 bytes per example in memory and maps the rest.

    It may be handed to the workers of a data loader: files are opened where they are read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._state: list[tuple[str, int]] = []
        self._files: list[str] = []
        self._handles: dict[str, Any] = {}
        self._high = np.empty(0, dtype=np.int64)
        self._places = np.empty((0, 4), dtype=np.int64)  # low half of the key, file, start, stop
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def __len__(self) -> int:
        return len(self._high)

    def __contains__(self, key: object) -> bool:
        return self._find(key) is not None

    def refresh(self) -> bool:
        """Take note of shards that were listed since; returns whether there were any."""
        state = [(path.name, path.stat().st_mtime_ns) for path in sorted(self.directory.glob("index-*.json"))]
        if state == self._state:
            return False
        self._state = state
        self._files, blocks = [], []
        for entry in listed_shards(self.directory):
            shard = self._open(entry["file"])
            keys, offsets = shard.get_tensor("keys").numpy(), shard.get_tensor("offsets").numpy()
            place = np.full(len(keys), len(self._files))
            blocks.append(np.stack([keys[:, 0], keys[:, 1], place, offsets[:-1], offsets[1:]], axis=1))
            self._files.append(entry["file"])

        table = np.concatenate(blocks) if blocks else np.empty((0, 5), dtype=np.int64)
        table = table[np.argsort(table[:, 0], kind="stable")]
        self._high, self._places = np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1:])
        return True

    def read(self, key: Key) -> Record | None:
        """Return the record of a key, tensors ``[tokens, ...]`` in the types they were written with; None for none."""
        place = self._find(key)
        if place is None:
            return None
        file, start, stop = place
        shard = self._open(self._files[file])
        return {name: shard.get_slice(name)[start:stop] for name in set(shard.keys()) - _DIRECTORY}

    def keys(self) -> Iterator[Key]:
        """All keys, in no particular order."""
        for high, place in zip(self._high, self._places, strict=True):
            yield int(high), int(place[0])

    def _find(self, key: Any) -> tuple[int, int, int] | None:
        high, low = key
        row = int(np.searchsorted(self._high, high))
        while row < len(self._high) and self._high[row] == high:
            if self._places[row, 0] == low:
                _, file, start, stop = self._places[row].tolist()
                return file, start, stop
            row += 1

        return None

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            path = self.directory / file
            try:
                self._handles[file] = safe_open(path, "pt")
            except Exception as error:  # the library's own exception, or the system's
                raise TeacherError(
                    f"{path} cannot be read ({one_line(str(error))}): run `sekd cache` again."
                ) from error

        return self._handles[file]


def listed_shards(directory: Path) -> list[dict[str, Any]]:
    """Return the entries of all ranks: file, number, bytes, xxh3, examples, tokens.

    Raises:
        TeacherError: an index is damaged.
    """
    return [entry for path in sorted(directory.glob("index-*.json")) for entry in read_json(path)["shards"]]


def damaged_shards(directory: Path, progress: Callable[[int], None] = lambda _: None) -> dict[str, str]:
    """Read every listed shard and return what is wrong, by file; empty for an intact cache.

    Args:
        directory: of the cache.
        progress: called with the size of each shard after it has been read.
    """
    found = {}
    for entry in listed_shards(directory):
        complaint = damage(directory, entry)
        if complaint is not None:
            found[entry["file"]] = complaint
        progress(entry["bytes"])

    return found


def drop_shards(directory: Path, files: set[str]) -> None:
    """Take shards off the indices and delete them, so that their examples count as missing."""
    for path in sorted(directory.glob("index-*.json")):
        entries = read_json(path)["shards"]
        kept = [entry for entry in entries if entry["file"] not in files]
        if len(kept) < len(entries):
            write_json(path, {"shards": kept})

    for file in files:
        (directory / file).unlink(missing_ok=True)


def _index_path(directory: Path, rank: int) -> Path:
    return directory / f"index-{rank:05d}.json"
