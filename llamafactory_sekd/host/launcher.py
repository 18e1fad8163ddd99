"""The host's command line with our `eval`, and our lines in `help` and `env`; USE_V1 refuses our stage."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

from llamafactory_sekd import __version__
from llamafactory_sekd.arguments import STAGE
from llamafactory_sekd.children import end_with_parent
from llamafactory_sekd.errors import HostError
from llamafactory_sekd.host import ledger
from llamafactory_sekd.host.patches import PATCHES


# What torchrun starts on each rank under `python -m llamafactory_sekd train`; not for users.
_RANK_COMMAND = "train-rank"
_EVAL_HELP = "|   llamafactory-cli eval -h: evaluate translations (llamafactory_sekd) |"


def extend_launch(host_launch: Callable[[], None]) -> Callable[[], None]:
    """Wrap the host's ``launch``: `eval` is ours, `help` and `env` gain our lines, the rest is the host's.

    Training of our stage on several ranks ends with the process that it was started by.
    """

    @wraps(host_launch)
    def launch() -> None:
        command = sys.argv[1] if len(sys.argv) > 1 else "help"
        if command == "eval":
            from llamafactory_sekd.host.evaluate import run_eval

            run_eval(sys.argv[2:])
            return
        if command == "train" and ledger.sekd_requested(sys.argv[2:]):
            with _torchrun_ends_with_us(host_launch):
                host_launch()
            return
        host_launch()
        if command == "help":
            print(_EVAL_HELP)
        elif command == "env":
            print(describe())

    return launch


@contextmanager
def _torchrun_ends_with_us(host_launch: Any) -> Iterator[None]:
    """For the duration, what the host starts by `subprocess.run`, torchrun, does not outlive this process."""
    names = host_launch.__globals__
    original = names["subprocess"]
    names["subprocess"] = SimpleNamespace(run=partial(original.run, preexec_fn=end_with_parent))
    try:
        yield
    finally:
        names["subprocess"] = original


def describe() -> str:
    """Return the plug-in's part of ``llamafactory-cli env``: its version and its patches."""
    lines = [f"- `llamafactory_sekd` version: {__version__} (supports LLaMA-Factory {ledger.SUPPORTED})"]
    applied = set(ledger.applied())
    for patch in PATCHES:
        state = "applied" if patch.name in applied else "waits for the module's import"
        lines.append(f"  - {patch.name}: {patch.what} ({state})")

    return "\n".join(lines) + "\n"


def refuse_v1(host_launch: Callable[[], None]) -> Callable[[], None]:
    """Wrap the launcher that USE_V1=1 selects: it refuses our stage and passes everything else through."""

    @wraps(host_launch)
    def launch() -> None:
        if ledger.sekd_requested(sys.argv[1:]):
            raise HostError(f"USE_V1=1 selects trainers without a teacher: unset USE_V1 for `stage: {STAGE}`.")
        host_launch()

    return launch


def launch_explicitly() -> None:
    """Run the host's command line with the plug-in applied by us rather than by ``import torch``.

    The host's launcher gives torchrun the file that it calls its own; here that is us, so that every rank applies the
    plug-in explicitly as well.
    """
    from llamafactory import launcher
    from llamafactory.cli import main

    if sys.argv[1:2] == [_RANK_COMMAND]:
        from llamafactory.train.tuner import run_exp

        del sys.argv[1]
        run_exp()
        return
    launcher.__file__ = f"-m llamafactory_sekd {_RANK_COMMAND}"
    main()
