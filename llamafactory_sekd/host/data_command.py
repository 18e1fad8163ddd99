"""The command line ``sekd data``: a corpus as a data set, a teacher's look at it, a teacher's own prompts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamafactory_sekd.errors import ArgumentError


if TYPE_CHECKING:
    from rich.console import Console

    from llamafactory_sekd.data.pairs import Progress
    from llamafactory_sekd.host.corpus import Judged

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
    directions: Annotated[str | None, typer.Option(help="Directions, such as en-de,cs-en. Default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Output directory.")] = Path("data/alma"),
    overwrite: Overwrite = False,
) -> None:
    """Write ALMA's training, WMT21 validation and WMT22 test data; a second run verifies it."""
    from rich.console import Console
    from rich.progress import Progress

    from llamafactory_sekd.data.alma import DirectorySource, HubSource, make_plan, prepare_alma, splits

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
    plain: Annotated[bool, typer.Option("--plain", help="Leave out Parrot's heading, for chat templates.")] = False,
    prompt: Annotated[str | None, typer.Option(help="A prompt of your own, with {source}.")] = None,
    quoted: Annotated[bool, typer.Option("--quoted", help="The TSV has quotation marks from a spreadsheet.")] = False,
    valid: Annotated[int, typer.Option(help="Pairs to hold out for validation, as NAME_valid.", min=0)] = 0,
    test: Annotated[int, typer.Option(help="Pairs to hold out for testing, as NAME_test.", min=0)] = 0,
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
    corpus = Corpus.of(src, tgt, tsv, json_file, quoted=quoted)
    with _progress_bars() as progress:
        manifest, fresh = prepare_pairs(
            corpus,
            direction,
            name,
            out,
            overwrite,
            prompt=worded,
            both=both,
            valid=valid,
            test=test,
            progress=progress,
        )
    _report(console, manifest, fresh, out, "parrot" if worded == PARROT else "that of your model (qwen, llama3, …)")


@app.command()
def check(
    teacher: Annotated[str, typer.Option(help="The model that reads the corpus: a path or hub id.")],
    source_language: Annotated[str, typer.Option("--from", help="Language code of the source side.")],
    target_language: Annotated[str, typer.Option("--to", help="Language code of the target side.")],
    src: Annotated[Path | None, typer.Option(help="Source sentences, one per line.")] = None,
    tgt: Annotated[Path | None, typer.Option(help="Their translations, line by line.")] = None,
    tsv: Annotated[Path | None, typer.Option(help="Instead of both: lines of source, tab, target.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Or: JSON Lines.")] = None,
    template: Annotated[
        str, typer.Option(help="LLaMA-Factory's template; with any other than parrot the prompt is plain.")
    ] = "parrot",
    below: Annotated[
        float | None,
        typer.Option(
            help="Doubt a reference whose tokens' probabilities have a geometric mean below this.", min=0, max=1
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pairs per forward pass.", min=1)] = 16,
    out: Annotated[Path, typer.Option(help="The suspicious pairs, as TSV.")] = Path("suspects.tsv"),
    keep: Annotated[Path | None, typer.Option(help="All other pairs, as TSV for `sekd data pairs --tsv`.")] = None,
) -> None:
    """Let a teacher read parallel text and list the pairs that look wrong; an interrupted command resumes."""
    import os

    for name in ("LLAMAFACTORY_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")

    from rich.console import Console
    from rich.progress import Progress

    from llamafactory_sekd.data.checks import Findings, clean_pairs
    from llamafactory_sekd.data.languages import parse_direction
    from llamafactory_sekd.data.pairs import Corpus
    from llamafactory_sekd.host.corpus import DOUBT, check_corpus, read_with, write_kept, write_suspects

    direction = parse_direction(f"{source_language}-{target_language}")
    findings = Findings()
    blocks = Corpus.of(src, tgt, tsv, json_file).blocks(direction)
    pairs = clean_pairs(chain.from_iterable(blocks), findings)
    memory = out.with_name(f".{out.name}.read.json")
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("Pairs", total=len(pairs))
        probabilities = read_with(
            teacher,
            template,
            pairs,
            direction,
            batch_size=batch_size,
            memory=memory,
            progress=lambda count: bars.advance(bar, count),
        )
    doubt = DOUBT if below is None else below
    judged = check_corpus(pairs, direction, probabilities, doubt)
    suspects = write_suspects(out, judged)
    console = Console()
    for line in _summary(judged, doubt):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if findings.items:
        console.print(f"Findings: {findings.summary()}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{suspects:,} suspicious pairs: {out}", highlight=False, markup=False, soft_wrap=True)
    if keep is not None:
        kept = write_kept(keep, judged)
        console.print(f"{kept:,} other pairs: {keep}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def informed(
    dataset: Annotated[str, typer.Argument(help="A data set of dataset_info.json, in alpaca format.")],
    dataset_dir: Annotated[Path, typer.Option(help="LLaMA-Factory's dataset_dir.")] = Path("data"),
    name: Annotated[str | None, typer.Option(help="Name of the teacher's data set. Default: NAME_informed.")] = None,
    previous: Annotated[int, typer.Option(help="Sentences of the document before each one.", min=0)] = 0,
    examples: Annotated[
        int, typer.Option(help="Translations of sentences like each one, from the data set itself.", min=0)
    ] = 0,
    pool: Annotated[int, typer.Option(help="Take examples from this many records, the first ones.", min=1)] = 2000,
    documents: Annotated[
        Path | None,
        typer.Option(help="File with the name of each record's document, one per line. Default: a single document."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote.")] = False,
) -> None:
    """Write the data set that a better informed teacher reads: the same records with more context.

    Then: sekd cache X.yaml --out DIR --teacher-dataset NAME_informed
    """
    from rich.console import Console
    from rich.progress import Progress

    from llamafactory_sekd.translation.wider_prompts import Widening, write_informed

    called = name or f"{dataset}_informed"
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("Records", total=None)
        manifest, fresh = write_informed(
            dataset,
            dataset_dir,
            called,
            Widening(previous, examples, pool),
            documents,
            overwrite=overwrite,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    records = manifest["files"][f"{called}.json"]["records"]
    line = f"{'Written' if fresh else 'Verified'}: {called}, {records:,} records. Next: sekd cache X.yaml --out DIR"
    print(f"{line} --teacher-dataset {called}")


@contextmanager
def _progress_bars() -> Iterator[Progress]:
    """Give what shows how far the corpus has been read and how long the rest takes: a bar, or lines of a log."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def progress(what: str, done: int, total: int, pairs: int) -> None:
        if what not in bars:
            seconds = 0.5 if sys.stderr.isatty() else 30
            often = {"mininterval": seconds, "maxinterval": seconds}
            bars[what] = tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, **often)
        bars[what].set_postfix_str(f"{pairs:,} pairs", refresh=False)
        bars[what].update(done - bars[what].n)
        if done == total:
            bars[what].close()

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _report(console: Console, manifest: dict[str, Any], fresh: bool, out: Path, template: str = "parrot") -> None:
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{'Written to' if fresh else 'Verified in'} {out}")  # brackets in a path are no markup
    table = Table("Data set", "Pairs", "SHA-256", title=title)
    table.columns[1].justify = "right"
    datasets = {
        Path(name).stem: entry for name, entry in manifest["files"].items() if name.endswith((".json", ".jsonl"))
    }
    for name, entry in datasets.items():
        table.add_row(name, f"{entry['records']:,}", entry["sha256"][:12])
    console.print(table)
    for finding in manifest["findings"]:
        console.print(_finding(finding), highlight=False, markup=False, soft_wrap=True)
    for folder in sorted({str(Path(name).parent) for name in manifest["files"]} - {"."}):
        console.print(f"Test set: task: {folder}, task_dir: {out}", highlight=False, markup=False, soft_wrap=True)
    largest = max(datasets, key=lambda name: datasets[name]["records"])
    validation = next((f"eval_dataset: {name}, " for name in datasets if name.endswith("_valid")), "")
    usage = f"In LLaMA-Factory: dataset_dir: {out}, dataset: {largest}, {validation}template: {template}"
    console.print(usage, highlight=False, markup=False, soft_wrap=True)


def _finding(finding: dict[str, Any]) -> str:
    lines = finding["lines"]
    shown = ", ".join(str(line) for line in lines[:SHOWN_LINES])
    more = f" and {finding['count'] - SHOWN_LINES:,} more (see the manifest)" if len(lines) > SHOWN_LINES else ""
    pairs = "pair" if finding["count"] == 1 else "pairs"
    return f"{finding['count']:,} {pairs} {finding['outcome']}: {finding['words']}: {finding['file']}:{shown}{more}"


def _summary(judged: list[Judged], doubt: float) -> list[str]:
    from llamafactory_sekd.host.corpus import REASONS, doubted_lines

    lines = []
    for reason, words in REASONS.items():
        count = sum(reason in one.reasons for one in judged)
        note = f" (probability below {doubt:g})" if reason == "doubted" else ""
        lines.append(f"{count:>8,} of {len(judged):,} pairs: {words}{note}")
    lines += doubted_lines([(one.probability, one.pair.source, one.pair.target) for one in judged])
    return lines
