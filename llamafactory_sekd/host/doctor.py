"""The command line ``sekd doctor``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer


if TYPE_CHECKING:
    from rich.console import Console

    from llamafactory_sekd.host.run_arguments import HostArguments
    from llamafactory_sekd.planner.planned_run import Run

app = typer.Typer(add_completion=False)


@app.command()
def doctor(
    config: Annotated[Path, typer.Argument(help="A training YAML, of `stage: sekd` or `sft`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for `llamafactory-cli train`.")] = None,
    devices: Annotated[
        int | None, typer.Option(help="Number of devices. Default: as many as the launcher would use.", min=1)
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of one accelerator, such as 80GB. Default: this machine's CUDA device, else RAM."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of the longest example. Default: cutoff_len.", min=1)
    ] = None,
    responses: Annotated[
        float,
        typer.Option(help="Share of the tokens that are responses; translations are less than half.", min=0, max=1),
    ] = 0.5,
    look: Annotated[
        int,
        typer.Option(
            help="Also read the weights and this many examples, and report how hard they are and which look wrong.",
            min=0,
        ),
    ] = 0,
) -> None:
    """Estimate a run's memory, check that its teacher fits, and count cut text, before any weight is read.

    With --look, teacher and student also read the first examples, and the command recommends an objective.
    """
    for name in ("LLAMAFACTORY_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")

    warnings.simplefilter("ignore")
    from rich.console import Console

    from llamafactory_sekd.argument_checks import idle_keys
    from llamafactory_sekd.config import read_config
    from llamafactory_sekd.host.memory_plan import parse, run_of
    from llamafactory_sekd.host.run_names import wrong_names
    from llamafactory_sekd.planner import memory_report as report
    from llamafactory_sekd.planner.estimate import CONTEXT, estimate

    keys = read_config(config, overrides or [])
    console = Console()
    parsed = parse(keys)
    wrong_data, wrong_models = wrong_names(parsed)
    for line in (*wrong_data, *wrong_models):
        console.print(f"Problem: {line}", highlight=False, markup=False, soft_wrap=True)
    if wrong_models:
        report.print_verdict(console, None, 0, problems=len(wrong_data) + len(wrong_models))
        raise typer.Exit(2)

    given = report.parse_memory(memory) if memory is not None else report.device_memory()
    accelerator = given is not None and not parsed.training.use_cpu
    count = devices or report.devices_of_the_environment()

    def describe(arguments: HostArguments) -> Run:
        return run_of(arguments, count, accelerator=accelerator, length=length, responses=responses)

    run = describe(parsed)
    libraries = CONTEXT if accelerator else report.resident_memory()
    available = given if accelerator and given is not None else report.main_memory() // count

    with console.status("Rehearsing a step"):
        result = estimate(run, libraries)

    report.print_estimate(console, result, run, available)
    if not report.fits(result, available):

        def plan(changed: Mapping[str, Any]) -> Any:
            return estimate(describe(parse(changed)), libraries)

        with console.status("Looking for remedies"):
            priced = list(report.price(keys, run, result.device, available, plan))

        report.print_remedies(console, priced, available)

    for line in idle_keys(parsed.finetuning) if parsed.finetuning.use_sekd else ():
        console.print(f"Keys: {line}", highlight=False, markup=False, soft_wrap=True)

    readable = False
    if not wrong_data:
        _check_teacher(console, parsed)
        readable = _count_cut_text(console, parsed)
        if look:
            _look(console, keys, look)

    report.print_verdict(console, result, available, problems=len(wrong_data), readable=readable)
    if wrong_data:
        raise typer.Exit(2)


def _look(console: Console, keys: dict[str, Any], count: int) -> None:
    from llamafactory_sekd.host.corpus import look, report

    with console.status(f"Reading {count:,} examples"):
        sample = look(keys, count)

    for line in report(sample):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _count_cut_text(console: Console, parsed: HostArguments) -> bool:
    """Print what is cut, or why it is not known; return whether the data could be read."""
    from llamafactory_sekd.host.run_names import made_for_another_template
    from llamafactory_sekd.host.tokenizing import UNREADABLE, cut_text_of

    lines = cut_text_of(parsed)
    for line in [*made_for_another_template(parsed), *lines]:
        console.print(f"Data: {line}", highlight=False, markup=False, soft_wrap=True)
    return not any(line.startswith(UNREADABLE) for line in lines)


def _check_teacher(console: Console, parsed: HostArguments) -> None:
    if not parsed.finetuning.use_sekd or not parsed.finetuning.teacher_model:
        return

    from llamafactory_sekd.host.memory_plan import missing_tokenizer, vocabulary_line
    from llamafactory_sekd.host.teacher_loading import check_fit

    missing = missing_tokenizer(parsed)
    if missing:
        console.print(f"Teacher: not checked, {missing}.", highlight=False, markup=False, soft_wrap=True)
        return

    others = check_fit(parsed, logged=False)
    line = vocabulary_line(parsed) or "its tokenizer is the student's, and so is the size of its head."
    for text in (line, *others):
        console.print(f"Teacher: {text}", highlight=False, markup=False, soft_wrap=True)
