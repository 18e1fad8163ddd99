"""The command line ``sekd data``: options, progress and summaries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamafactory_sekd.errors import ArgumentError


if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(help="Prepare parallel text for training and evaluation.", no_args_is_help=True)

# How many lines of each finding are shown; the manifest has them all.
SHOWN_LINES = 5

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote.")]


@app.callback()
def data() -> None:
    """Prepare parallel text for training and evaluation."""


@app.command()
def alma(
    source: Annotated[str, typer.Option(help="'hub', or the directory of a clone of ALMA's repository.")] = "hub",
    pairs: Annotated[str, typer.Option(help="Language pairs: de-en, cs-en, is-en, ru-en, zh-en.")] = "de-en,cs-en",
    directions: Annotated[str | None, typer.Option(help="Directions, such as en-de,cs-en [default: all].")] = None,
    out: Annotated[Path, typer.Option(help="Where the data goes.")] = Path("data/alma"),
    overwrite: Overwrite = False,
) -> None:
    """Write ALMA's training, WMT21 validation and WMT22 test data; a second run verifies it."""
    from rich.console import Console
    from rich.progress import Progress

    from llamafactory_sekd.data.alma import make_plan, prepare_alma, splits
    from llamafactory_sekd.data.sources import DirectorySource, HubSource

    console = Console()
    plan = make_plan(_listed(pairs), _listed(directions) if directions is not None else None)
    chosen = HubSource() if source == "hub" else DirectorySource(Path(source))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(splits(plan)))

        def step(name: str) -> None:
            progress.update(task, advance=1, description=name)

        manifest, fresh = prepare_alma(chosen, plan, out, overwrite, step)
    _report(console, manifest, fresh, out)


@app.command()
def pairs(
    source_language: Annotated[str, typer.Option("--from", help="Language code of the source side.")],
    target_language: Annotated[str, typer.Option("--to", help="Language code of the target side.")],
    name: Annotated[str, typer.Option(help="Name of the data set in LLaMA-Factory.")],
    src: Annotated[Path | None, typer.Option(help="Source sentences, one per line.")] = None,
    tgt: Annotated[Path | None, typer.Option(help="Their translations, line by line.")] = None,
    tsv: Annotated[Path | None, typer.Option(help="Instead of both: lines of source, tab, target.")] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help='Or: JSON Lines, {"translation": {"en": …, "de": …}} or without "translation".'),
    ] = None,
    source_name: Annotated[str | None, typer.Option("--from-name", help="The source language's name.")] = None,
    target_name: Annotated[str | None, typer.Option("--to-name", help="The target language's name.")] = None,
    both: Annotated[bool, typer.Option("--both", help="Add the opposite direction.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="No heading of Parrot's: for chat templates.")] = False,
    prompt: Annotated[str | None, typer.Option(help="A prompt of your own, with {source}.")] = None,
    out: Annotated[Path, typer.Option(help="The dataset_dir of LLaMA-Factory.")] = Path("data"),
    overwrite: Overwrite = False,
) -> None:
    """Write your own parallel text as a data set and declare it to LLaMA-Factory; a second run verifies it."""
    from rich.console import Console

    from llamafactory_sekd.data.languages import parse_direction
    from llamafactory_sekd.data.pairs import Corpus, prepare_pairs
    from llamafactory_sekd.data.prompts import PARROT, prompt_named

    if plain and prompt is not None:
        raise ArgumentError("Give either --plain or --prompt TEXT.")

    console = Console()
    direction = parse_direction(f"{source_language}-{target_language}", source_name, target_name)
    worded = prompt_named("plain" if plain else prompt)
    corpus = Corpus.of(src, tgt, tsv, json_file)
    with console.status(f"Reading {name}"):
        manifest, fresh = prepare_pairs(corpus, direction, name, out, overwrite, prompt=worded, both=both)
    _report(console, manifest, fresh, out, "parrot" if worded == PARROT else "that of your model (qwen, llama3, …)")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _report(console: Console, manifest: dict[str, Any], fresh: bool, out: Path, template: str = "parrot") -> None:
    from rich.table import Table

    table = Table("Data set", "Pairs", "SHA-256", title=f"{'Written to' if fresh else 'Verified in'} {out}")
    table.columns[1].justify = "right"
    datasets = {Path(name).stem: entry for name, entry in manifest["files"].items() if name.endswith(".json")}
    for name, entry in datasets.items():
        table.add_row(name, f"{entry['records']:,}", entry["sha256"][:12])
    console.print(table)
    for finding in manifest["findings"]:
        console.print(_finding(finding), highlight=False, markup=False, soft_wrap=True)
    largest = max(datasets, key=lambda name: datasets[name]["records"])
    usage = f"In LLaMA-Factory: dataset_dir: {out}, dataset: {largest}, template: {template}"
    console.print(usage, highlight=False, markup=False, soft_wrap=True)


def _finding(finding: dict[str, Any]) -> str:
    lines = finding["lines"]
    shown = ", ".join(str(line) for line in lines[:SHOWN_LINES])
    more = f" and {len(lines) - SHOWN_LINES} more (all in the manifest)" if len(lines) > SHOWN_LINES else ""
    pairs = "pair" if finding["count"] == 1 else "pairs"
    return f"{finding['count']} {pairs} {finding['outcome']}: {finding['words']}: {finding['file']}:{shown}{more}"
