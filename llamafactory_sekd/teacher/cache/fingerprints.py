"""Short names for long things: equal fingerprints mean equal tokens, equal templates, equal weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from llamafactory_sekd.teacher.cache.records import digest, digest_file
from llamafactory_sekd.teacher.vocabulary import SAMPLES


PACKAGES = ("torch", "transformers")
_WEIGHTS = ("model", "pytorch_model", "adapter_model")
_CONFIGS = ("config.json", "adapter_config.json")
# Where a model was saved, and by what, does not change what it computes.
_INCIDENTAL = ("_name_or_path", "base_model_name_or_path", "transformers_version", "torch_dtype", "dtype", "revision")


def of_tokenizer(tokenizer: Any) -> str:
    """Return the vocabulary, the special and the added tokens, and what becomes of text in several scripts."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    added = [
        [number, token.content, token.lstrip, token.rstrip, token.single_word, token.normalized, token.special]
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
    ]
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in SAMPLES]
    return _of([sorted(tokenizer.get_vocab().items()), special, added, encoded])


def of_ids(encoded: Any) -> str:
    """Token ids in nested lists: what a template makes of a fixed conversation."""
    return _of(encoded)


def of_folder(folder: Path) -> str:
    """Return the weights and the configuration of a saved model or adapter; reads every byte of them."""
    parts: list[Any] = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".gguf" or (path.suffix in (".safetensors", ".bin") and path.name.startswith(_WEIGHTS)):
            parts.append([path.name, digest_file(path)])
        elif path.name in _CONFIGS:
            config = json.loads(path.read_text(encoding="utf-8"))
            parts.append({key: value for key, value in config.items() if key not in _INCIDENTAL})

    return _of(parts)


def of_folders(folders: Sequence[Path]) -> str | None:
    """Several folders in order; None for none."""
    return _of([of_folder(folder) for folder in folders]) if folders else None


def of_software() -> dict[str, str]:
    """Return the versions of what computes the teacher."""
    return {name: metadata.version(name) for name in PACKAGES}


def _of(content: Any) -> str:
    return digest(json.dumps(content, sort_keys=True).encode())
