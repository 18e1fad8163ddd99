"""The way in: called by ``import torch``, registers post-import hooks for a few modules of LLaMA-Factory.

torch calls :func:`register` at its end through the entry-point group ``torch.backends``, in every process of the
environment. So this module uses the standard library alone, :func:`register` never raises, and a process that does not
import LLaMA-Factory pays for one function call. All that can fail happens in the hooks, which run when LLaMA-Factory
itself is imported and may raise.

Environment variables: ``LLAMAFACTORY_SEKD=0`` switches the plug-in off; ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` switches
torch's mechanism off, and ``python -m llamafactory_sekd`` then applies the same hooks explicitly.
"""

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


# The modules whose import is followed by a patch. `host/patches.py` holds the patches; a test holds the two equal.
TARGETS: tuple[str, ...] = (
    "llamafactory.extras.constants",
    "llamafactory.hparams.finetuning_args",
    "llamafactory.hparams.parser",
    "llamafactory.data.template",
    "llamafactory.data.loader",
    "llamafactory.train.callbacks",
    "llamafactory.train.sft",
    "llamafactory.train.sft.trainer",
    "llamafactory.extras.ploting",
    "llamafactory.webui.locales",
    "llamafactory.webui.control",
    "llamafactory.webui.runner",
    "llamafactory.webui.components.train",
    "llamafactory.webui.components.eval",
    "llamafactory.webui.components.infer",
    "llamafactory.launcher",
    "llamafactory.v1.launcher",
)


class PostImportFinder(importlib.abc.MetaPathFinder):
    """Finds the target modules as usual and calls ``callback(module)`` each time one has been executed."""

    def __init__(self, targets: Sequence[str], callback: Callable[[ModuleType], None]) -> None:
        self.targets = frozenset(targets)
        self.callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the module's own spec with a loader that runs the callback, or None for every other module.

        A look-up alone (``importlib.util.find_spec``) uses nothing up: whoever executes the module later still gets
        the callback. The other finders are asked directly, with the ``path`` that was passed in:
        ``importlib.util.find_spec`` would import the parent while the import lock of the child is held, and two
        threads that import would wait for each other.
        """
        if fullname not in self.targets:
            return None

        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and not isinstance(spec.loader, _CallbackLoader):
                    spec.loader = _CallbackLoader(spec.loader, self.callback)
                return spec
        return None


class _CallbackLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, callback: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.callback = callback

    def __getattr__(self, name: str) -> object:
        # Whoever only looks a module up reads its source, its path or its resources through the loader.
        if name == "loader":  # not set yet, in a copy
            raise AttributeError(name)
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module's own loader goes back to its place: `inspect` and `pkgutil` look for it there.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader

        self.loader.exec_module(module)
        self.callback(module)


# Targets that were imported before the hooks; the first hook that runs reports them (the entry point may not raise).
too_late: tuple[str, ...] = ()


def _apply(module: ModuleType) -> None:
    importlib.import_module("llamafactory_sekd.host.ledger").apply(module, too_late)


def registered() -> bool:
    """Whether the hooks stand in this process."""
    return any(isinstance(finder, PostImportFinder) for finder in sys.meta_path)


def register() -> None:
    """Register the hooks, once; never raises. The entry point in the group ``torch.backends``."""
    global too_late
    if os.environ.get("LLAMAFACTORY_SEKD", "1") == "0" or registered():
        return

    too_late = tuple(name for name in TARGETS if name in sys.modules)
    sys.meta_path.insert(0, PostImportFinder(TARGETS, _apply))
