"""The commands ``sekd …`` and ``python -m llamafactory_sekd …``. Thin: each sub-command lives in its own room."""

from __future__ import annotations

import sys
from importlib import import_module

from llamafactory_sekd.errors import SekdError


# Sub-command -> the module whose typer application `app` it is; imported only when it is asked for.
COMMANDS: dict[str, tuple[str, str]] = {
    "data": ("llamafactory_sekd.data.commands", "prepare ALMA, WMT and your own parallel data"),
    "cache": ("llamafactory_sekd.host.cache_command", "compute a teacher once, for all runs that follow"),
    "doctor": ("llamafactory_sekd.host.doctor", "estimate a run's memory before any weight is read"),
    "demo": ("llamafactory_sekd.demo.commands", "run the whole job on a small scale"),
    "study": ("llamafactory_sekd.study.commands", "run a matrix of trainings, its tables and figures"),
}


def main() -> None:
    """Entry point of ``sekd``."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_usage())
        return

    if name not in COMMANDS:
        sys.exit(f"sekd: error: unknown command {name!r}.\n{_usage()}")

    try:
        if COMMANDS[name][0].startswith("llamafactory_sekd.host."):
            apply_plugin()

        app = import_module(COMMANDS[name][0]).app
        app(args=sys.argv[2:], prog_name=f"sekd {name}")
    except SekdError as error:
        print(f"sekd {name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def _usage() -> str:
    rows = [f"  sekd {name:<8}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["Usage: sekd COMMAND …   (sekd COMMAND --help for its options)", *rows])


def apply_plugin() -> None:
    """Register the import hooks explicitly, whether or not torch's mechanism is switched on.

    Raises:
        HostError: a module of the host was imported before.
    """
    from llamafactory_sekd import autoload
    from llamafactory_sekd.host import ledger

    autoload.register()
    ledger.refuse_if_late(autoload.too_late)


def host_main() -> None:
    """Entry point of ``python -m llamafactory_sekd``: the host's commands with the plug-in applied explicitly."""
    apply_plugin()
    from llamafactory_sekd.host.launcher import launch_explicitly

    launch_explicitly()


if __name__ == "__main__":  # what torchrun starts on each rank: -m llamafactory_sekd.cli
    main()
