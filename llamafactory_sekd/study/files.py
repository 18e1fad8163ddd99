"""YAML files as the host reads them, and the folder that one study at a time works in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from llamafactory_sekd.data.files import write_atomic
from llamafactory_sekd.errors import StudyError


def read_yaml(path: Path, overrides: Sequence[str] = (), beneath: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the keys of a YAML file over those of ``beneath``, with the overrides ``key=value`` over both.

    Mappings are merged key by key, everything else is replaced. Raises :class:`StudyError` for what cannot be read.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    malformed = next((text for text in overrides if "=" not in text), None)
    if malformed is not None:
        raise StudyError(f"{malformed!r} is not an override: write key=value.")
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise StudyError(f"{path} must hold keys and values.")
        merged = OmegaConf.merge(beneath or {}, loaded, OmegaConf.from_cli(list(overrides)))
        config = OmegaConf.to_container(merged, resolve=True)
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror} (paths are relative to {Path.cwd()}).") from None
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} cannot be parsed: {' '.join(str(error).split())}") from None
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def write_yaml(path: Path, config: dict[str, Any], comment: str) -> None:
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=119)
    write_atomic(path, f"# {comment}\n{text}".encode())


@contextmanager
def only_one(lock: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file for the length of the block; a second process gets a :class:`StudyError`, or waits."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=-1 if wait else 0)
        held.acquire()
    except Timeout:
        raise StudyError(f"Another process is at work on {what}: wait for it to end.") from None
    except OSError as error:
        raise StudyError(f"Cannot write to {lock.parent}: {error.strerror}.") from None
    try:
        yield
    finally:
        held.release()
