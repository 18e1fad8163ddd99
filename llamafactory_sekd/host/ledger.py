"""Applies and undoes the patches of :mod:`llamafactory_sekd.host.patches`, in the supported versions of the host.

A patch replaces one attribute of one module of the host, right after that module was imported and before anything else
could bind the attribute. So every patch is one record: module, attribute, a function from the host's value to ours.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet

from llamafactory_sekd import __version__
from llamafactory_sekd.arguments import STAGE
from llamafactory_sekd.config import peek
from llamafactory_sekd.errors import HostError, SekdError
from llamafactory_sekd.files import no_room
from llamafactory_sekd.host.patches import PATCHES, Patch


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


@dataclass(frozen=True)
class _Applied:
    """A patch in this process: where it is, the host's value and ours."""

    module: ModuleType
    attribute: str
    original: Any
    replacement: Any

    def is_in_effect(self) -> bool:
        """Return whether the module, as it is imported now, still has our value."""
        module = sys.modules.get(self.module.__name__, self.module)
        return getattr(module, self.attribute, None) is self.replacement


_applied: dict[str, _Applied] = {}


def apply(module: ModuleType, too_late: Sequence[str] = ()) -> None:
    """Apply the patches of a module that was just imported.

    Args:
        module: the module; patches of other modules are left alone.
        too_late: target modules that were imported before the hooks stood.

    Where the plug-in cannot work (loaded too late, or an unsupported version of the host) it is disabled with
    a warning, so that the host keeps working; only a run that asks for our stage is refused.

    Raises:
        HostError: a patch is applied already, the host lacks the name, or the plug-in is off and our stage asked for.
    """
    _report_errors_in_one_line()
    obstacle = _too_late_message(too_late) if too_late else _version_message()
    if obstacle:
        _stay_off(obstacle)
        return
    for patch in PATCHES:
        if patch.module == module.__name__:
            _apply_one(patch, module)


def refuse_if_late(too_late: Sequence[str]) -> None:
    """Raise a HostError that names the target modules which were imported before the hooks stood, if there are any."""
    if too_late:
        raise HostError(_too_late_message(too_late))


def _apply_one(patch: Patch, module: ModuleType) -> None:
    before = _applied.get(patch.name)
    # A module that was executed again (`importlib.reload`) has the host's value, and gets ours again.
    if before is not None and getattr(module, patch.attribute, None) is before.replacement:
        raise HostError(f"{patch.name} is patched already: patches are applied once per process, by the import hooks.")
    if not hasattr(module, patch.attribute):
        raise HostError(
            f"LLaMA-Factory {host_version()} has no {patch.name}, which llamafactory_sekd {__version__} "
            f"patches: install a supported host with {REMEDY}, or switch the plug-in off with "
            "LLAMAFACTORY_SEKD=0."
        )
    value = getattr(module, patch.attribute)
    place, _, function = patch.replace.partition(":")
    replacement = getattr(importlib.import_module(place), function)(value)
    setattr(module, patch.attribute, replacement)
    _applied[patch.name] = _Applied(module, patch.attribute, value, replacement)


def applied() -> list[str]:
    """Return the dotted names that are patched in this process, in the order of application."""
    return list(_applied)


def original(name: str) -> Any:
    """Return the host's value of a dotted name that is patched in this process."""
    return _applied[name].original


def check_in_effect() -> None:
    """Check that every patch of a module that is imported is in effect: at the start of each run of our stage.

    Raises:
        HostError: one is not, so that the host's own code would run in its place.
    """
    for patch in PATCHES:
        record = _applied.get(patch.name)
        if patch.module in sys.modules and (record is None or not record.is_in_effect()):
            raise HostError(
                f"{patch.name} is not patched in this process, so `stage: {STAGE}` would not be what runs: start with "
                "`llamafactory-cli` or `python -m llamafactory_sekd`, and import torch before LLaMA-Factory."
            )

    tuner, sft = sys.modules.get("llamafactory.train.tuner"), sys.modules.get("llamafactory.train.sft")
    if tuner is not None and sft is not None and getattr(tuner, "run_sft", None) is not sft.run_sft:
        raise HostError(
            "llamafactory.train.tuner has a `run_sft` of its own, so the host's trainer would run in place of ours: "
            "something has replaced or reloaded it in this process; start a new one."
        )


def undo() -> None:
    """Put every original back (names that other modules bound meanwhile keep what they have)."""
    while _applied:
        _, record = _applied.popitem()
        setattr(record.module, record.attribute, record.original)


def _too_late_message(too_late: Sequence[str]) -> str:
    return (
        f"llamafactory_sekd was loaded too late and is disabled: {', '.join(too_late)} was imported before "
        "`import torch` had run. Import torch first, or start with `llamafactory-cli` or "
        "`python -m llamafactory_sekd`."
    )


def _version_message() -> str:
    """Why this version of the host cannot be patched; empty where it can."""
    if is_supported():
        return ""
    return (
        f"llamafactory_sekd {__version__} does not support LLaMA-Factory {host_version()} and stays switched "
        f"off: install a supported host with {REMEDY}."
    )


def _stay_off(message: str) -> None:
    if sekd_requested(sys.argv[1:]):
        raise HostError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _report_errors_in_one_line() -> None:
    if getattr(sys.excepthook, "reports_sekd_errors", False):
        return
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        line = f"error: {error}" if isinstance(error, SekdError) else _end_of_our_run(error)
        if line is None:
            previous(kind, error, traceback)
        elif line:
            print(f"llamafactory_sekd: {line}", file=sys.stderr)

    excepthook.reports_sekd_errors = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook


def _end_of_our_run(error: BaseException) -> str | None:
    """Return what a run of our stage says where it was interrupted or the disk is full; None for every other error.

    Neither is a fault of the code, whose place a traceback would show. Ranks leave Ctrl-C to the command that they
    were started by.
    """
    if not sekd_requested(sys.argv[1:]):
        return None
    continues = "without `overwrite_output_dir: true` the same command goes on from the last complete checkpoint"
    if isinstance(error, KeyboardInterrupt):
        return "" if "RANK" in os.environ else f"interrupted; {continues}."
    words = no_room(error)
    return f"error: no room to write ({words}): free some; {continues}." if words else None
