"""YAML files as the host reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

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
    """Write a YAML file with a comment, a command as a rule, in its first line."""
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=119)
    write_atomic(path, f"# {comment}\n{text}".encode())
