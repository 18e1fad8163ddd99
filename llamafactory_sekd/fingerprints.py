"""Short names for long things: equal fingerprints mean equal bytes, equal weights, equal text.

Two digests are in use, because files of earlier versions hold both of them. SHA-256 names what people compare with
other tools: test sets, translations, data sets, the models of an evaluation. xxh3 names what is read again at every
start and may be tens of gigabytes: the records of a cache and the weights of its teacher.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from llamafactory_sekd import __version__
from llamafactory_sekd.errors import DataError
from llamafactory_sekd.files import read_json, write_json


_BLOCK = 8 * 2**20
# The files that loading a model reads. Optimizer states, logs and model cards are next to them and change nothing.
_MODEL_FILES = (
    "*.safetensors",
    "*.index.json",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "*.gguf",
    "*.py",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "quantize_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
)
# Those among them that decide what a teacher answers to token ids: no tokenizer, no generation settings.
_WEIGHTS = ("model", "pytorch_model", "adapter_model")
_CONFIGS = ("config.json", "adapter_config.json")
# Where a model was saved, and by what, does not change what it computes.
_INCIDENTAL = ("_name_or_path", "base_model_name_or_path", "transformers_version", "torch_dtype", "dtype", "revision")
_COMPUTING = ("torch", "transformers")


def sha256(content: bytes | str) -> str:
    """Return the SHA-256 of some bytes, or of a text in UTF-8; a text that is not valid Unicode has one, too."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()


def growing_sha256() -> hashlib._Hash:
    """Return a SHA-256 that grows by ``update`` with a file that is still being written."""
    return hashlib.sha256()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256 of a value as JSON in any order of keys; what JSON does not know counts as text."""
    return sha256(json.dumps(value, ensure_ascii=False, sort_keys=True, default=str))


def xxh3(data: bytes) -> str:
    """Return the xxh3 digest of some bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def xxh3_of(path: Path) -> str:
    """Return the xxh3 digest of a file; reads it in blocks."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            state.update(block)

    return state.hexdigest()


def xxh3_of_json(value: Any) -> str:
    """Return the xxh3 digest of a value as JSON, whatever the order of its keys."""
    return xxh3(json.dumps(value, sort_keys=True).encode())


def xxh3_of_model(folder: Path) -> str:
    """Return the digest of the weights and the configuration of a saved model or adapter; reads every byte of them."""
    parts: list[Any] = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".gguf" or (path.suffix in (".safetensors", ".bin") and path.name.startswith(_WEIGHTS)):
            parts.append([path.name, xxh3_of(path)])
        elif path.name in _CONFIGS:
            config = json.loads(path.read_text(encoding="utf-8"))
            parts.append({key: value for key, value in config.items() if key not in _INCIDENTAL})

    return xxh3_of_json(parts)


def xxh3_of_models(folders: Sequence[Path]) -> str | None:
    """Return the digest of several folders in order; None for none."""
    return xxh3_of_json([xxh3_of_model(folder) for folder in folders]) if folders else None


class Digests:
    """SHA-256 of files; with a ``path``, remembered there for as long as size and modification time stay the same."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        known = read_json(path) if path is not None else None
        self._known: dict[str, list[Any]] = known if isinstance(known, dict) else {}

    def of_file(self, file: Path) -> str:
        """Return the SHA-256 of a file; one that has the same size and time as before is not read again."""
        status = file.stat()
        key = str(file.resolve())
        stamp = [status.st_size, status.st_mtime_ns]
        if self._known.get(key, [])[:2] != stamp:
            self._known[key] = [*stamp, sha256_of(file)]
            if self._path is not None:
                write_json(self._path, self._known)
        return self._known[key][2]

    def of_model(self, folder: Path) -> dict[str, str]:
        """Return ``{file: SHA-256}`` of the files that loading the model of a folder reads."""
        files = [path for path in sorted(folder.iterdir()) if any(fnmatch(path.name, p) for p in _MODEL_FILES)]
        return {path.name: self.of_file(path) for path in files}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of this package and of those that are installed."""
    found = {"llamafactory_sekd": __version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def computing_software() -> dict[str, str]:
    """Return the versions of what computes a teacher's answers."""
    return {name: metadata.version(name) for name in _COMPUTING}
