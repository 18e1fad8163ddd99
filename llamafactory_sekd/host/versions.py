"""Which LLaMA-Factory this is, whether we support it, and whether a command line asks for our stage."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path

from packaging.specifiers import SpecifierSet

from llamafactory_sekd.arguments import STAGE
from llamafactory_sekd.config import peek


SUPPORTED = SpecifierSet(">=0.9.4,<0.10", prereleases=True)
REMEDY = '`pip install "llamafactory>=0.9.4,<0.10"`'


def host_version() -> str:
    """Return the installed version of LLaMA-Factory, or "unknown" where it runs from a plain folder."""
    try:
        return metadata.version("llamafactory")
    except metadata.PackageNotFoundError:
        return "unknown"


def is_supported() -> bool:
    """Whether the installed host is in the supported range (a host without metadata counts as not supported)."""
    version = host_version()
    return version != "unknown" and version in SUPPORTED


def sekd_requested(argv: Sequence[str]) -> bool:
    """Whether a command line (without the program's name) asks for ``stage: sekd``.

    It looks at ``--stage sekd``, ``stage=sekd`` and the ``stage`` of a YAML or JSON file, and it never raises: what
    cannot be read is refused elsewhere.
    """
    words = [word for argument in argv for word in argument.removeprefix("--").split("=", 1)]
    if any(key == "stage" for key in words):
        return ("stage", STAGE) in pairwise(words)

    files = [Path(word) for word in argv if word.endswith((".yaml", ".yml", ".json"))]
    return any(peek(file).get("stage") == STAGE for file in files)
