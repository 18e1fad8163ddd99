"""The command line ``sekd study``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer


if TYPE_CHECKING:
    from rich.console import Console


app = typer.Typer(help="Run a matrix of trainings and evaluations.", add_completion=False)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="The study's YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value; dots reach nested keys.")] = None,
    jobs: Annotated[int, typer.Option(help="Number of runs in parallel.", min=1)] = 1,
    devices: Annotated[str | None, typer.Option(help="GPUs to divide among the runs, such as 0,1,2,3.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Write all files and print the commands.")] = False,
    slurm: Annotated[Path | None, typer.Option(help="Write a SLURM array script there.")] = None,
    only: Annotated[str | None, typer.Option(help="Run one cell or model, by id or number.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Collect and report what exists.")] = False,
) -> None:
    """Train and evaluate every system of a study at every point of its matrix, with every seed.

    After an interruption, the same command resumes; finished runs are skipped.
    """
    import logging

    from rich.console import Console

    from llamafactory_sekd.study import engine
    from llamafactory_sekd.study.matrix import check_keys
    from llamafactory_sekd.study.running import parse_devices, training_keys
    from llamafactory_sekd.study.spec import read_spec

    logging.disable(logging.WARNING)  # the libraries' chatter would break the progress bars
    console = Console()
    opened = engine.open_study(read_spec(file, overrides or []))
    if not report_only:
        check_keys(opened.cells, training_keys())
    if list_only:
        for line in engine.list_commands(opened, engine.find_inputs(opened)):
            print(line)
        return
    if slurm is not None:
        count = len(opened.spec.models) + len(opened.cells)
        engine.write_slurm(slurm, ["sekd", "study", str(file), *(overrides or [])], opened, count)
        console.print(f"{slurm} runs {count} tasks: sbatch {slurm}", highlight=False, markup=False, soft_wrap=True)
        return

    failed: list[str] = []
    with interruptible(console):
        if only is not None:
            failed = engine.run_one(opened, only, devices=parse_devices(devices), console=console)
        elif report_only:
            inputs = engine.find_inputs(opened)
            for line in engine.changes(inputs):
                console.print(f"{line}; it is left out", highlight=False, markup=False, soft_wrap=True)
            engine.write_study(opened, inputs)
        else:
            failed = engine.run_study(opened, jobs=jobs, devices=parse_devices(devices), console=console)

    if only is None:
        for path in engine.report(opened, console):
            console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    end_with(failed, console)


@contextmanager
def interruptible(console: Console) -> Iterator[None]:
    """Say to a user who interrupts that nothing is lost, and end with the status of an interruption."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("Interrupted. The same command continues from here.")
        raise typer.Exit(130) from None


def end_with(failed: Sequence[str], console: Console) -> None:
    """End the command with status 2 where runs have failed, and name them."""
    if failed:
        console.print(f"{len(failed)} failed: {', '.join(failed)}. The same command tries them again.", markup=False)
        raise typer.Exit(2)
