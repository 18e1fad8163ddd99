"""Applies and undoes the patches of :mod:`llamafactory_sekd.host.patches`.

A patch replaces one attribute of one module of the host, right after that module was imported and before anything else
could bind the attribute. So every patch is one record: module, attribute, a function from the host's value to ours.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from llamafactory_sekd import __version__
from llamafactory_sekd.errors import HostError, SekdError
from llamafactory_sekd.host import versions


@dataclass(frozen=True)
class Patch:
    """One change to the host.

    Attributes:
        module: the host's module.
        attribute: the name that is replaced in it.
        replace: from the host's value to ours; called once, right after the module's import.
        what: what the replacement does.
        why: why it cannot be done without a patch.
        remove_when: what has to happen in the host for the patch to go.
    """

    module: str
    attribute: str
    replace: Callable[[Any], Any]
    what: str
    why: str
    remove_when: str

    @property
    def name(self) -> str:
        """The dotted name of what is replaced."""
        return f"{self.module}.{self.attribute}"


_originals: dict[str, tuple[ModuleType, str, Any]] = {}


def apply(module: ModuleType, too_late: Sequence[str] = ()) -> None:
    """Apply the patches of a module that was just imported.

    Args:
        module: the module; patches of other modules are left alone.
        too_late: target modules that were imported before the hooks stood.

    Where the plug-in cannot work (it came too late, or the host's version is not supported) it stays switched off with
    a warning, so that the host keeps working; only a run that asks for our stage is refused.

    Raises:
        HostError: a patch stands already, the host lacks the name, or the plug-in is off and our stage asked for.
    """
    _report_errors_in_one_line()
    obstacle = _too_late_message(too_late) if too_late else _version_message()
    if obstacle:
        _stay_off(obstacle)
        return

    from llamafactory_sekd.host.patches import PATCHES

    for patch in PATCHES:
        if patch.module == module.__name__:
            _apply_one(patch, module)


def refuse_if_late(too_late: Sequence[str]) -> None:
    """Raise a HostError that names the target modules which were imported before the hooks stood, if there are any."""
    if too_late:
        raise HostError(_too_late_message(too_late))


def _apply_one(patch: Patch, module: ModuleType) -> None:
    if patch.name in _originals:
        raise HostError(f"{patch.name} is patched already: patches are applied once per process, by the import hooks.")

    if not hasattr(module, patch.attribute):
        raise HostError(
            f"LLaMA-Factory {versions.host_version()} has no {patch.name}, which llamafactory_sekd {__version__} "
            f"patches: install a supported host with {versions.REMEDY}, or switch the plug-in off with "
            "LLAMAFACTORY_SEKD=0."
        )

    original = getattr(module, patch.attribute)
    setattr(module, patch.attribute, patch.replace(original))
    _originals[patch.name] = (module, patch.attribute, original)


def applied() -> list[str]:
    """Return the dotted names that are patched in this process, in the order of application."""
    return list(_originals)


def undo() -> None:
    """Put every original back (names that other modules bound meanwhile keep what they have)."""
    while _originals:
        _, (module, attribute, original) = _originals.popitem()
        setattr(module, attribute, original)


def _too_late_message(too_late: Sequence[str]) -> str:
    return (
        f"llamafactory_sekd came too late and stays switched off: {', '.join(too_late)} was imported before "
        "`import torch` had run. Import torch first, or start with `llamafactory-cli` or "
        "`python -m llamafactory_sekd`."
    )


def _version_message() -> str:
    """Why this version of the host cannot be patched; empty where it can."""
    if versions.is_supported():
        return ""

    return (
        f"llamafactory_sekd {__version__} does not support LLaMA-Factory {versions.host_version()} and stays switched "
        f"off: install a supported host with {versions.REMEDY}."
    )


def _stay_off(message: str) -> None:
    if versions.sekd_requested(sys.argv[1:]):
        raise HostError(message)

    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _report_errors_in_one_line() -> None:
    if getattr(sys.excepthook, "reports_sekd_errors", False):
        return

    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if isinstance(error, SekdError):
            print(f"llamafactory_sekd: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    excepthook.reports_sekd_errors = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook
