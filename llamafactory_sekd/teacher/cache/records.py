"""JSON and safetensors files that appear complete or not at all, and that notice when they have changed since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from llamafactory_sekd.errors import DataError, TeacherError
from llamafactory_sekd.files import write_atomic
from llamafactory_sekd.fingerprints import xxh3, xxh3_of, xxh3_of_json


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
