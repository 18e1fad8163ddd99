"""What decides a system's translations, condensed to one SHA-256.

Files count by content, not by name or date, so a model may be moved or copied; the digests of unchanged files are
remembered, since hashing tens of gigabytes takes a while.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.evaluation_settings import Decoding, System
from llamafactory_sekd.evaluation.translator import Description, ModelSource, Request
from llamafactory_sekd.files import read_json, write_json


# The files that loading reads. Optimizer states, logs and model cards are next to them and change nothing.
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
_LOCATION_KEYS = ("model_name_or_path", "adapter_name_or_path")


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
            with open(file, "rb") as stream:
                self._known[key] = [*stamp, hashlib.file_digest(stream, "sha256").hexdigest()]
            if self._path is not None:
                write_json(self._path, self._known)
        return self._known[key][2]

    def of_source(self, source: ModelSource, system: str) -> dict[str, str]:
        """Return ``{file: SHA-256}`` of a directory's model files, or the commit of a hub repository."""
        place = locate(source, system)
        if isinstance(place, str):
            return {"hub": place}
        files = [path for path in sorted(place.iterdir()) if any(fnmatch(path.name, p) for p in _MODEL_FILES)]
        return {path.name: self.of_file(path) for path in files}


def locate(source: ModelSource, system: str) -> Path | str:
    """Return the directory of a model, or ``repository@commit`` where it comes from the hub.

    Raises :class:`EvaluationError`, naming the ``system``, when there is no model there.
    """
    folder = Path(source.location)
    if not folder.is_dir():
        return f"{source.location}@{_hub_commit(source, system)}"
    if not (folder / source.config).is_file():
        raise EvaluationError(f"`systems.{system}`: {folder} has no {source.config}, so it holds no model.")
    return folder


def _hub_commit(source: ModelSource, system: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        config = hf_hub_download(source.location, source.config, revision=source.revision)
    except HFValidationError:
        raise EvaluationError(f"`systems.{system}`: the directory {source.location} does not exist.") from None
    except Exception as error:
        # The hub's client raises dozens of types: no network, no such repository, no permission.
        reason = str(error).strip().split("\n")[0]
        raise EvaluationError(
            f"`systems.{system}`: {source.location} is neither a directory nor available on the Hub ({reason})."
        ) from None
    return Path(config).parent.name


def system_fingerprint(
    system: System,
    description: Description,
    decoding: Decoding,
    requests: Sequence[Request],
    digests: Digests,
    versions: dict[str, str],
) -> str:
    """Return the SHA-256 of all that decides how ``system`` answers ``requests`` (prompts before the template)."""
    arguments = {key: value for key, value in (system.model or {}).items() if key not in _LOCATION_KEYS}
    return _hash(
        {
            "sources": [digests.of_source(source, system.name) for source in description.sources],
            "arguments": arguments,
            "template": description.template,
            "decoding": asdict(decoding),
            "messages": [[one.message, *one.examples] if one.examples else one.message for one in requests],
            "versions": versions,
        }
    )


def lines_fingerprint(lines: Sequence[str]) -> str:
    """Return the fingerprint of translations that came from elsewhere."""
    return _hash({"lines": list(lines)})


def _hash(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
