"""The command line ``sekd translate``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from llamafactory_sekd.errors import ArgumentError


app = typer.Typer(add_completion=False)
_model, _text, _method, _output, _machine = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Model", "Text", "Method", "Output", "Speed and machines")
)


@app.command(epilog="Recipes: docs/translate.md")
def translate(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Model arguments of LLaMA-Factory: infer_dtype=bfloat16, quantization_bit=4, …"),
    ] = None,
    model: Annotated[str, _model(help="A folder or a hub id.")] = "",
    adapter: Annotated[str | None, _model(help="An adapter on it.")] = None,
    template: Annotated[str, _model(help="LLaMA-Factory's template.")] = "parrot",
    source_language: Annotated[str | None, _text("--from", help="Language code of the text.")] = None,
    target_language: Annotated[str | None, _text("--to", help="Language codes, such as de,cs.")] = None,
    source_name: Annotated[str | None, _text("--from-name", help="The source language's name.")] = None,
    target_name: Annotated[str | None, _text("--to-name", help="The target language's name.")] = None,
    directions: Annotated[str | None, _text(help="In place of both: en-de,de-en.")] = None,
    text: Annotated[
        Path | None, _text("--in", help="Plain lines, .tsv or .jsonl; may be compressed. Default: stdin.")
    ] = None,
    dataset: Annotated[str | None, _text(help="Or a data set of dataset_info.json.")] = None,
    dataset_dir: Annotated[Path, _text(help="Its folder.")] = Path("data"),
    alma: Annotated[Path | None, _text(help="Or a clone of ALMA.")] = None,
    split: Annotated[str, _text(help="ALMA's train, valid or test.")] = "train",
    prompt: Annotated[str | None, _text(help="parrot, plain, or your own with {source}.")] = None,
    method: Annotated[str, _method(help="greedy, beam, sample or mbr.")] = "greedy",
    samples: Annotated[
        int | None, _method(help="Samples per sentence. Default: 16 for mbr, else --n-best.", min=1)
    ] = None,
    beams: Annotated[int | None, _method(help="Width of the beam. Default: 4.", min=2)] = None,
    n_best: Annotated[int, _method(help="Translations to write.", min=1)] = 1,
    metric: Annotated[str | None, _method(help="For mbr: chrf or comet. Default: chrf.")] = None,
    comet_model: Annotated[str, _method(help="A checkpoint or a hub name.")] = "Unbabel/wmt22-comet-da",
    keep: Annotated[
        str | None, _method(help="reference: the candidate closest to it by chrF, where there is one.")
    ] = None,
    temperature: Annotated[float | None, _method(help="Default: 1.")] = None,
    top_p: Annotated[float | None, _method(help="Default: 1.")] = None,
    top_k: Annotated[int | None, _method(help="Default: all.")] = None,
    seed: Annotated[int, _method(help="Seed of the samples.", min=0)] = 42,
    max_new_tokens: Annotated[int, _method(help="Limit of a translation.", min=1)] = 256,
    length_penalty: Annotated[float, _method(help="For beam search.")] = 1.0,
    out: Annotated[
        Path | None,
        _output(help="A file: .txt, .tsv or .jsonl, compressed with .gz; with --name a dataset_dir. Default: stdout."),
    ] = None,
    name: Annotated[str | None, _output(help="Write a data set of this name into --out.")] = None,
    mix: Annotated[
        float | None,
        _output(help="Share of a data set's records to translate; the others keep the reference.", min=0.0, max=1.0),
    ] = None,
    filters: Annotated[
        str,
        _output(help="all, none, or of empty,limit,language,loop,length,copy: counted, and left out of data sets."),
    ] = "all",
    work: Annotated[Path | None, _output(help="Where finished sentences are kept. Default: OUT.work.")] = None,
    overwrite: Annotated[
        bool, _output("--overwrite", help="Replace a data set that was made with other options.")
    ] = False,
    shard: Annotated[str | None, _machine(help="Only part I of N, written I/N.")] = None,
    join: Annotated[int | None, _machine(help="Put N finished parts together.", min=1)] = None,
    slurm: Annotated[Path | None, _machine(help="Write a SLURM array script of the --join parts there.")] = None,
    backend: Annotated[str, _machine(help="hf or vllm.")] = "hf",
    batch_tokens: Annotated[int, _machine(help="Tokens decoded at a time.", min=1)] = 16384,
    batch_size: Annotated[int | None, _machine(help="At most this many translations at a time.", min=1)] = None,
) -> None:
    """Translate text with any model, to read it or to train a student on it.

    sekd translate --model M --from en --to de < in.txt > out.txt
    """
    from llamafactory_sekd.data.languages import Direction, parse_direction
    from llamafactory_sekd.data.prompts import prompt_named
    from llamafactory_sekd.host.translating import Inputs, Outputs, Weights, run_translate
    from llamafactory_sekd.translation.candidates import check_name, make_plan, parse_shard, work_folder
    from llamafactory_sekd.translation.choosing import form_of, parse_filters
    from llamafactory_sekd.translation.source_texts import SPLITS

    if not model:
        raise ArgumentError("Name the model: --model FOLDER or a hub id.")
    if sum(given is not None for given in (text, dataset, alma)) > 1:
        raise ArgumentError("Give one of --in, --dataset and --alma.")
    if dataset is not None and prompt is not None:
        raise ArgumentError("`--prompt` has no effect on `--dataset`, whose records have prompts; remove it.")
    if split not in SPLITS:
        raise ArgumentError(f"`--split {split}`: use one of {', '.join(SPLITS)}.")
    chosen: list[Direction] = []
    if dataset is None and not any((directions, source_language and target_language, source_name and target_language)):
        raise ArgumentError("Name the languages: --from en --to de, or --directions en-de,de-en.")
    if directions is not None:
        if source_language or target_language:
            raise ArgumentError("Give either --directions or --from and --to.")
        chosen = [parse_direction(part.strip()) for part in directions.split(",")]
    elif target_language is not None and (source_language is not None or dataset is None):
        targets = [code.strip() for code in target_language.split(",")]
        if target_name is not None and len(targets) > 1:
            raise ArgumentError("`--to-name` names one language, and `--to` several.")
        chosen = [parse_direction(f"{source_language or 'und'}-{code}", source_name, target_name) for code in targets]
    if (
        dataset is None
        and alma is None
        and len({direction.source for direction in chosen}) > 1
        and not _has_sides(text)
    ):
        raise ArgumentError("One text has one source language: use .jsonl with both sides, or one run for each.")
    plan = make_plan(
        method,
        samples=samples,
        beams=beams,
        n_best=n_best,
        metric=metric,
        keep=keep,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        length_penalty=length_penalty,
        backend=backend,
    )
    if mix is not None and name is None:
        raise ArgumentError("`--mix` makes a data set: give its `--name`, or remove it.")
    if name is not None:
        check_name(name)
        if out is None:
            raise ArgumentError("`--name` needs `--out`, the dataset_dir of LLaMA-Factory.")
    elif form_of(out) != ".jsonl" and (n_best > 1 or len(chosen) > 1):
        what = f"--n-best {n_best}" if n_best > 1 else "more than one direction"
        raise ArgumentError(f"{what} does not fit lines of text: write `--out FILE.jsonl`, or a data set with --name.")
    part = parse_shard(shard)
    if (shard is not None or join is not None) and out is None and work is None:
        raise ArgumentError("`--shard` and `--join` need `--out` (or `--work`), where the parts are kept.")
    if shard is not None and join is not None:
        raise ArgumentError("Give either --shard I/N or --join N.")
    if slurm is not None:
        if join is None or not any((text, dataset, alma)):
            lacks = "`--join N`, the number of parts" if join is None else "`--in`, `--dataset` or `--alma`"
            raise ArgumentError(f"`--slurm {slurm}` needs {lacks}: add it.")
        _write_array(slurm, join, (work_folder(out, name, work) or Path.cwd()) / "logs")
        return
    run_translate(
        Weights(model, adapter, template, overrides or []),
        Inputs(text, dataset, dataset_dir, alma, split, chosen, prompt_named(prompt), target_language, mix),
        plan,
        Outputs(out, name, parse_filters(filters), work, overwrite, part, join),
        comet_model=comet_model,
        seed=seed,
        batch_tokens=batch_tokens,
        batch_size=batch_size,
    )


def _write_array(path: Path, parts: int, logs: Path) -> None:
    """Write a script that runs this command once for each part, and say what to do with it."""
    import sys

    from llamafactory_sekd.children import write_array

    words = sys.argv[sys.argv.index("translate") + 1 :]
    joins = ["sekd", "translate", *_without(words, "--slurm")]
    write_array(
        path,
        _without(joins, "--join"),
        f'--shard "$SLURM_ARRAY_TASK_ID/{parts}"',
        what=f"A translation in {parts} parts",
        name="sekd-translate",
        notes=("A task that was stopped resumes when it is submitted again. When all are done, put them together:",),
        afterwards=joins,
        tasks=(1, parts),
        logs=logs,
        error=ArgumentError,
    )
    print(f"{path} runs {parts} tasks: sbatch {path}", file=sys.stderr)


def _without(words: list[str], option: str) -> list[str]:
    """Return a command's words without an option and its value."""
    kept, skips = [], False
    for word in words:
        if not skips and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        skips = word == option
    return kept


def _has_sides(text: Path | None) -> bool:
    return text is not None and any(part in (".json", ".jsonl") for part in text.suffixes)
