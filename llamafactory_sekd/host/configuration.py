"""A training YAML with overrides, as the host reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamafactory_sekd.errors import ArgumentError


def read_training_config(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the keys of a training YAML with the overrides ``key=value``.

    Raises:
        ArgumentError: the file or an override cannot be read.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    malformed = next((text for text in overrides if "=" not in text), None)
    if malformed is not None:
        raise ArgumentError(f"{malformed!r} is not an override: write key=value.")

    try:
        config = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_cli(overrides)))
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror}.") from None
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ArgumentError(f"{path} cannot be parsed: {' '.join(str(error).split())}") from None

    if not isinstance(config, dict):
        raise ArgumentError(f"{path} must hold keys and values.")

    return {str(key): value for key, value in config.items()}
