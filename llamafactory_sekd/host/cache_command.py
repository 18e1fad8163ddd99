"""The command line ``sekd cache``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(add_completion=False)


@app.command()
def cache(
    config: Annotated[Path, typer.Argument(help="The training YAML, with `teacher_model`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for `llamafactory-cli train`.")] = None,
    out: Annotated[Path, typer.Option(help="The cache's folder; an interrupted build resumes.")] = Path(
        "teacher_cache"
    ),
    kept: Annotated[str, typer.Option("--format", help="hidden (exact) or topk.")] = "hidden",
    k: Annotated[int, typer.Option("--k", help="Probabilities per token for topk, 8 to 512.")] = 64,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: the teacher's for hidden, float16 for topk."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples per forward pass. Default: per_device_train_batch_size.", min=1)
    ] = None,
    teacher_dataset: Annotated[
        str | None,
        typer.Option(help="Data sets that the teacher reads: the same responses in the same order, other prompts."),
    ] = None,
    teacher_template: Annotated[str | None, typer.Option(help="The template of the teacher's prompts.")] = None,
    teacher_system: Annotated[str | None, typer.Option(help="The teacher's system prompt.")] = None,
    server: Annotated[
        str | None, typer.Option(help="Ask the teacher of `sekd serve` at this address instead of loading one.")
    ] = None,
    in_flight: Annotated[int, typer.Option(help="Requests to the server at a time.", min=1, max=64)] = 4,
) -> None:
    """Compute the teacher once, over the training and evaluation sets of a YAML, for all runs that follow.

    With `teachers: {DATA SET: MODEL}` in place of `teacher_model`, each data set gets a cache of its own in --out.

    Several devices: torchrun --nproc-per-node N -m llamafactory_sekd.cli cache X.yaml --out DIR
    """
    from llamafactory_sekd.errors import ArgumentError
    from llamafactory_sekd.teacher.cache import DTYPES, FORMATS, Settings

    if kept not in FORMATS:
        raise ArgumentError(f"`--format {kept}` cannot be used: choose {' or '.join(FORMATS)}.")

    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"`--dtype {dtype}` cannot be used: choose one of {', '.join(DTYPES)}.")

    from llamafactory_sekd.config import read_config
    from llamafactory_sekd.host.cache import TEACHERS, TeacherPrompts, build_cache, build_caches

    keys, settings = read_config(config, overrides or []), Settings(kept, dtype, k)
    prompts = TeacherPrompts(teacher_dataset, teacher_template, teacher_system)
    if isinstance(keys.get("teacher_model"), dict):  # as a training has it
        keys[TEACHERS] = keys.pop("teacher_model")
    if keys.get(TEACHERS) is not None:
        if prompts or server is not None:
            raise ArgumentError(f"a server, and prompts of its own, are those of one teacher: remove `{TEACHERS}`.")

        build_caches(keys, out, settings, batch_size=batch_size)
        return

    keys.pop(TEACHERS, None)
    if server is None:
        build_cache(keys, out, settings, batch_size=batch_size, prompts=prompts)
    else:
        from llamafactory_sekd.host.served_teacher import build_from_server

        build_from_server(keys, out, settings, server, batch_size=batch_size, in_flight=in_flight, prompts=prompts)
