"""The command line ``sekd cache``: one cache, or one for each data set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamafactory_sekd.errors import ArgumentError


if TYPE_CHECKING:
    from llamafactory_sekd.teacher.cache.cache_manifest import Settings

app = typer.Typer(add_completion=False)
TEACHERS = "teachers"
_REPLACED = (TEACHERS, "dataset", "eval_dataset", "do_eval")


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
    from llamafactory_sekd.teacher.cache.cache_manifest import Settings
    from llamafactory_sekd.teacher.cache.formats import DTYPES, FORMATS

    if kept not in FORMATS:
        raise ArgumentError(f"`--format {kept}` cannot be used: choose {' or '.join(FORMATS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"`--dtype {dtype}` cannot be used: choose one of {', '.join(DTYPES)}.")
    from llamafactory_sekd.config import read_config
    from llamafactory_sekd.host.cache import TeacherPrompts, build_cache

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


def build_caches(config: dict[str, Any], out: Path, settings: Settings, *, batch_size: int | None = None) -> None:
    """Fill a cache for each data set with its own teacher, as ``out/<data set>``.

    Args:
        config: the training YAML's keys, with ``teachers``, from data set to model, in place of ``teacher_model``.
        out: the folder of the caches.
        settings, batch_size: see :func:`llamafactory_sekd.host.cache.build_cache`.

    Raises:
        ArgumentError: a data set has no teacher, or ``teachers`` names what the run does not read.
        TeacherError: see :func:`llamafactory_sekd.host.cache.build_cache`.
    """
    from llamafactory_sekd.host.cache import build_cache
    from llamafactory_sekd.ranks import position

    teachers = _checked(config)
    shared = {key: value for key, value in config.items() if key not in _REPLACED}
    for name, model in teachers.items():
        # Every set is read as one of training: the records are the same, and each has the teacher of its name.
        build_cache({**shared, "dataset": name, "teacher_model": model}, out / name, settings, batch_size=batch_size)

    folders = ",".join(str(out / name) for name in teachers)
    if position()[0] == 0:
        print(f"In the training YAML, in place of `{TEACHERS}`: teacher_cache: {folders}")


def _checked(config: dict[str, Any]) -> dict[str, str]:
    from llamafactory_sekd.host.run_arguments import check_teacher_of_each

    teachers = config[TEACHERS]
    if not isinstance(teachers, Mapping) or not all(isinstance(model, str) for model in teachers.values()):
        raise ArgumentError(
            f"`{TEACHERS}: {teachers}` cannot be used: give a model for each data set, {{NAME: MODEL}}."
        )
    for key in ("teacher_model", "val_size"):
        if config.get(key):
            raise ArgumentError(
                f"`{key}: {config[key]}` cannot be used together with `{TEACHERS}`: remove one of them."
            )

    check_teacher_of_each(TEACHERS, teachers, config.get("dataset"), config.get("eval_dataset"))
    return {str(name): model for name, model in teachers.items()}
