"""YAML files of users: read as the host reads its own, with overrides, and with errors of one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llamafactory_sekd.errors import ArgumentError, SekdError, one_line
from llamafactory_sekd.files import write_atomic


def read_config(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    beneath: dict[str, Any] | None = None,
    error: type[SekdError] = ArgumentError,
) -> dict[str, Any]:
    """Return the keys of a YAML or JSON file over those of ``beneath``, with ``key=value`` overrides over both.

    Mappings are merged key by key, everything else is replaced; ``${…}`` is resolved.

    Raises:
        SekdError: of the class ``error``: the file or an override cannot be read.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if path.suffix not in (".yaml", ".yml", ".json"):
        raise error(f"{path} is not a YAML file.")
    given = read_overrides(overrides, error)
    try:
        is_json = path.suffix == ".json"
        loaded = OmegaConf.create(json.loads(path.read_text("utf-8"))) if is_json else OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise error(f"{path} must hold keys and values.")
        merged = OmegaConf.merge(beneath or {}, loaded, given)
        config = OmegaConf.to_container(merged, resolve=True)
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror}. Paths are relative to {Path.cwd()}.") from None
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, json.JSONDecodeError) as failure:
        raise error(f"{path} cannot be parsed: {one_line(str(failure))}") from None
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def read_overrides(texts: Sequence[str], error: type[SekdError] = ArgumentError) -> dict[str, Any]:
    """Return the keys of ``key=value`` overrides; ``a.b=1`` is the key ``b`` of the mapping ``a``.

    Raises:
        SekdError: of the class ``error``: an override cannot be read.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for text in texts:
        if "=" not in text:
            raise error(f"{text!r} is not an override: write key=value.")
        try:
            OmegaConf.from_cli([text])
        except (OmegaConfBaseException, yaml.YAMLError) as failure:
            reason = one_line(str(failure))
            raise error(
                f"the override {text!r} cannot be read ({reason}): a value is YAML, in which text with braces or "
                "brackets needs quotes, as in 'key=[\"a_{seed}\"]'."
            ) from None
    given = OmegaConf.to_container(OmegaConf.from_cli(list(texts)))
    assert isinstance(given, dict)
    return {str(key): value for key, value in given.items()}


def peek(path: Path) -> dict[str, Any]:
    """Return the keys of a YAML or JSON file that is somebody else's to check; none where it cannot be read."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def write_yaml(path: Path, config: dict[str, Any], comment: str) -> None:
    """Write a YAML file with a comment in its first line."""
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=119)
    write_atomic(path, f"# {comment}\n{text}")
