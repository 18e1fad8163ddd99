"""The command line ``sekd data`` with what needs other rooms: a teacher's look, and a teacher's prompts."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamafactory_sekd.data.corpora_command import app


if TYPE_CHECKING:
    from llamafactory_sekd.host.corpus import Judged


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


def _summary(judged: list[Judged], doubt: float) -> list[str]:
    from llamafactory_sekd.host.corpus import REASONS, doubted_lines

    lines = []
    for reason, words in REASONS.items():
        count = sum(reason in one.reasons for one in judged)
        note = f" (probability below {doubt:g})" if reason == "doubted" else ""
        lines.append(f"{count:>8,} of {len(judged):,} pairs: {words}{note}")
    lines += doubted_lines([(one.probability, one.pair.source, one.pair.target) for one in judged])
    return lines
