"""The commands ``sekd …`` and ``python -m llamafactory_sekd …``. Thin: each sub-command lives in its own room."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, NamedTuple

import typer

from llamafactory_sekd import __version__
from llamafactory_sekd.errors import SekdError
from llamafactory_sekd.files import no_room


class Command(NamedTuple):
    """A sub-command: the module whose typer application ``app`` it is, and its line on the help page.

    ``interrupted`` is what Ctrl-C ends with, where the command itself does not say it.
    """

    module: str
    summary: str
    group: str
    interrupted: str = ""


_HELP = ["-h", "--help"]
_CTRL_C = 130  # the status that typer ends with, without a word
PREPARE, RUN = "Before a run", "Runs"
_CONTINUES = "interrupted; nothing is half-written, and the same command resumes"
# The modules are imported only when their command is asked for.
COMMANDS = {
    "init": Command("llamafactory_sekd.examples", "Write the example YAML files into a folder.", PREPARE),
    "schema": Command("llamafactory_sekd.host.schema", "Write JSON schemas of the YAML files, for editors.", PREPARE),
    "objectives": Command("llamafactory_sekd.presets_command", "List the objectives with their formulas.", PREPARE),
    "data": Command("llamafactory_sekd.host.data_command", "Prepare and check parallel data.", PREPARE, _CONTINUES),
    "doctor": Command("llamafactory_sekd.host.doctor", "Check a run's data and memory before it starts.", PREPARE),
    "cache": Command(
        "llamafactory_sekd.host.cache_command", "Compute a teacher once, for all runs that follow.", RUN, _CONTINUES
    ),
    "translate": Command(
        "llamafactory_sekd.host.translate_command", "Translate text, or make text to train on.", RUN, _CONTINUES
    ),
    "serve": Command("llamafactory_sekd.host.serve", "Serve a teacher to runs on other machines.", RUN),
    "study": Command(
        "llamafactory_sekd.study.study_command", "Run a matrix of trainings, its tables and figures.", RUN
    ),
    "card": Command("llamafactory_sekd.evaluation.model_card", "Write scores into a model's card.", RUN),
    "demo": Command("llamafactory_sekd.demo.demo_command", "Run the complete job on a small scale.", RUN),
}


def main() -> None:
    """Entry point of ``sekd``."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:  # the help page, the version, shell completion, or a name that needs correcting
        root()(args=sys.argv[1:] or ["--help"], prog_name="sekd")
        return

    try:
        module = COMMANDS[name].module
        if module.startswith("llamafactory_sekd.host."):
            apply_plugin()

        import_module(module).app(args=sys.argv[2:], prog_name=f"sekd {name}", help_option_names=_HELP)
    except SekdError as error:
        print(f"sekd {name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        _exit_without_host(f"sekd {name}", error)
    except SystemExit as end:
        if end.code == _CTRL_C and COMMANDS[name].interrupted:
            print(f"\nsekd {name}: {COMMANDS[name].interrupted}.", file=sys.stderr)
        raise
    except Exception as error:  # of a library's files as well, which know no error of ours
        words = no_room(error)
        if not words:
            raise
        print(
            f"sekd {name}: error: no room to write ({words}): free some, or set HF_HOME and the output to another "
            "disk, and start the same command again.",
            file=sys.stderr,
        )
        sys.exit(2)


def root() -> typer.Typer:
    """Return the application that knows the commands by name alone, without importing them."""
    app = typer.Typer(
        help="Knowledge distillation for LLaMA-Factory. Training and evaluation are the host's own commands: "
        "llamafactory-cli train, eval and webui.",
        epilog="sekd COMMAND --help shows a command's options.",
        context_settings={"help_option_names": _HELP},
    )
    app.callback()(_options)
    for name, command in COMMANDS.items():
        app.command(name, help=command.summary, rich_help_panel=command.group)(_named_only)

    return app


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=lambda asked: _print_version(asked), is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    """Hold the options of ``sekd`` itself."""


def _print_version(asked: bool) -> None:
    if asked:
        print(f"sekd {__version__}")
        raise typer.Exit


def _named_only() -> None:
    """Stand for a command on the help page; `main` runs the command itself."""


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

    try:
        launch_explicitly()
    except ModuleNotFoundError as error:
        _exit_without_host("llamafactory_sekd", error)


def _exit_without_host(name: str, error: ModuleNotFoundError) -> None:
    """End in one line where LLaMA-Factory is not installed; any other missing module is a bug and keeps its trace."""
    if (error.name or "").partition(".")[0] != "llamafactory":
        raise error

    print(
        f"{name}: error: LLaMA-Factory is not installed in this environment ({sys.executable}): "
        'pip install "llamafactory>=0.9.4,<0.10"',
        file=sys.stderr,
    )
    sys.exit(2)


if __name__ == "__main__":  # what torchrun starts on each rank: -m llamafactory_sekd.cli
    main()
