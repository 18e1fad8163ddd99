"""A teacher for each data set: one call of `sekd cache` fills a cache for each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.host.cache import build_cache
from llamafactory_sekd.host.teacher_choice import check_teacher_of_each
from llamafactory_sekd.ranks import position
from llamafactory_sekd.teacher.cache import Settings


TEACHERS = "teachers"
_REPLACED = (TEACHERS, "dataset", "eval_dataset", "do_eval")


def build_caches(
    config: dict[str, Any],
    out: Path,
    settings: Settings,
    *,
    batch_size: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Fill a cache for each data set with its own teacher, as ``out/<data set>``.

    Args:
        config: the training YAML's keys, with ``teachers``, from data set to model, in place of ``teacher_model``.
        out: the folder of the caches.
        settings, batch_size, say: see :func:`build_cache`.

    Raises:
        ArgumentError: a data set has no teacher, or ``teachers`` names what the run does not read.
        TeacherError: see :func:`build_cache`.
    """
    teachers = _checked(config)
    shared = {
        key: value for key, value in config.items() if key not in (TEACHERS, "dataset", "eval_dataset", "do_eval")
    }
    for name, model in teachers.items():
        # Every set is read as one of training: the records are the same, and each has the teacher of its name.
        build_cache(
            {**shared, "dataset": name, "teacher_model": model}, out / name, settings, batch_size=batch_size, say=say
        )

    folders = ",".join(str(out / name) for name in teachers)
    if position()[0] == 0:
        say(f"In the training YAML, in place of `{TEACHERS}`: teacher_cache: {folders}")


def _checked(config: dict[str, Any]) -> dict[str, str]:
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
