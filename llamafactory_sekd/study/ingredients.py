"""What decides the outcome of a run, so that it is done again when, and only when, something of it has changed.

Models and data count by content; files that have not changed in size and time are not read again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamafactory_sekd.arguments import cache_folders
from llamafactory_sekd.data.testsets import TestSet
from llamafactory_sekd.fingerprints import Digests, versions
from llamafactory_sekd.study.spec import TeacherCache


_TRAINING_PACKAGES = ("llamafactory", "torch", "transformers", "peft")
_EVALUATION_PACKAGES = (*_TRAINING_PACKAGES, "sacrebleu", "unbabel-comet")
_MODELS = ("model_name_or_path", "adapter_name_or_path", "teacher_model", "teacher_model_adapters")
_DATASETS = ("dataset", "eval_dataset")
_FILES = ("deepspeed", "fsdp_config")
# They say where things lie, or how fast they go.
_INCIDENTAL = ("output_dir", "teacher_cache")
# What is not there (yet, or any more), or is on the hub: it cannot be compared.
_UNKNOWN = "unknown"


def of_training(source: Mapping[str, Any], cache: TeacherCache | None, digests: Digests) -> dict[str, Any]:
    """Return the ingredients of a training as plain values.

    ``source`` names the teacher and not the study's own ``cache`` of it; caches that the YAML names in a teacher's
    place count by what they hold, wherever they are.
    """
    caches = {} if source.get("teacher_model") else dict(_caches(source, digests))
    return {
        "config": {key: value for key, value in source.items() if key not in _INCIDENTAL},
        "teacher_cache": dict(cache.options) if cache is not None else None,
        "models": {name: _model(name, digests) for key in _MODELS for name in _names(source.get(key))},
        "data": dict(_data(source, digests)),
        "versions": versions(_TRAINING_PACKAGES),
        **({"caches": caches} if caches else {}),
    }


def of_evaluation(
    config: Mapping[str, Any], model: Mapping[str, Any], test_sets: Mapping[str, TestSet], digests: Digests | None
) -> dict[str, Any]:
    """Return the ingredients of an evaluation; ``digests`` is None for a model whose training is accounted for."""
    names = [name for key in _MODELS for name in _names(model.get(key))] if digests is not None else []
    return {
        "config": {key: value for key, value in config.items() if key not in ("task_dir", "batch_size")},
        "model": {key: value for key, value in model.items() if key not in _MODELS},
        "models": {name: _model(name, digests) for name in names if digests is not None},
        "test_sets": {direction: test_set.fingerprint for direction, test_set in test_sets.items()},
        "versions": versions(_EVALUATION_PACKAGES),
    }


def _names(value: Any) -> list[str]:
    if isinstance(value, Mapping):  # a teacher for each data set
        return [str(name).strip() for name in value.values()]
    names = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(name).strip() for name in names]


def _model(name: str, digests: Digests) -> dict[str, str] | str:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _UNKNOWN
    config = "config.json" if (folder / "config.json").is_file() else "adapter_config.json"
    if not (folder / config).is_file():
        return _UNKNOWN
    return digests.of_model(folder)


def _caches(source: Mapping[str, Any], digests: Digests) -> Iterator[tuple[str, str]]:
    """Yield the digest of each cache's manifest, which names its teacher, by its place among several."""
    folders = cache_folders(source.get("teacher_cache"))
    if not folders:
        return
    from llamafactory_sekd.teacher.cache.cache_manifest import MANIFEST  # loads torch, which most studies plan without

    for number, folder in enumerate(folders, 1):
        manifest = Path(folder).expanduser() / MANIFEST
        yield str(number), digests.of_file(manifest) if manifest.is_file() else _UNKNOWN


def _data(source: Mapping[str, Any], digests: Digests) -> Iterator[tuple[str, Any]]:
    """Yield the digest of every local file that a training reads: data sets with their entries, DeepSpeed's JSON."""
    folder = Path(str(source.get("dataset_dir", "data")))
    entries = _entries(folder / "dataset_info.json")
    for name in (name for key in _DATASETS for name in _names(source.get(key))):
        entry = entries.get(name)
        path = folder / str(entry.get("file_name", name)) if isinstance(entry, Mapping) else folder / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = {str(file): digests.of_file(file) for file in files if file.is_file()}
        yield name, {"entry": entry, "files": found} if found else _UNKNOWN
    for key in _FILES:
        if isinstance(source.get(key), str) and Path(source[key]).is_file():
            yield key, digests.of_file(Path(source[key]))


def _entries(info: Path) -> dict[str, Any]:
    try:
        content = json.loads(info.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def difference(before: Any, now: Any, place: str = "") -> str | None:
    """Return where two ingredients differ first, as words, or None; what is unknown is like anything."""
    if before == now or _UNKNOWN in (before, now):
        return None
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return f"{place} was {_short(before)}, now {_short(now)}"
    for key in dict.fromkeys([*before, *now]):
        found = difference(before.get(key), now.get(key), f"{place}.{key}" if place else str(key))
        if found is not None:
            return found
    return None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}…"
