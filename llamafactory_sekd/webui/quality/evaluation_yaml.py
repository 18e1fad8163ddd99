"""From the section's fields to the YAML of ``llamafactory-cli eval``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.errors import DataError
from llamafactory_sekd.evaluation.evaluation_settings import parse_settings


BASE = "base"
TEACHER = "teacher"


def checkpoint_list(chosen: str | list[str] | None) -> list[str]:
    """Return what the page's field for one or several checkpoints holds as a list."""
    return [chosen] if isinstance(chosen, str) and chosen else list(chosen or [])


def results_folder(task: str) -> str:
    """Return the default results folder of a test set."""
    return f"results/{re.sub(r'[^A-Za-z0-9._+-]+', '-', task).strip('-.') or 'test'}"


def follow_test_set(task: str, save_dir: str, followed: str) -> tuple[str, str]:
    """Return the results folder for a new test set, and what to compare it with next time.

    A folder belongs to one test set. One that the user typed stays as it is.

    Args:
        task: the test set.
        save_dir: what the field holds.
        followed: what this function put there last.
    """
    default = results_folder(task)
    return (default if save_dir.strip() in ("", followed) else save_dir), default


def system_names(checkpoints: Iterable[str], with_base: bool, with_teacher: bool) -> dict[str, str | None]:
    """Name the systems: a checkpoint after its folder, the model itself `base`, the teacher `teacher`.

    Returns:
        Name to checkpoint; None for the other two.
    """
    systems: dict[str, str | None] = {BASE: None} if with_base else {}
    reserved = {BASE, TEACHER}
    for checkpoint in checkpoints:
        stem = re.sub(r"[^A-Za-z0-9._+-]+", "-", Path(checkpoint).name).strip("-._+") or "system"
        name, count = stem, 2
        while name in systems or name in reserved:
            name, count = f"{stem}-{count}", count + 1
        systems[name] = checkpoint

    return {**systems, TEACHER: None} if with_teacher else systems


def evaluation_config(
    values: Mapping[str, Any], systems: Mapping[str, Mapping[str, Any]], template: str
) -> dict[str, Any]:
    """Return the keys of the YAML file.

    Args:
        values: what the section's fields hold, by the evaluation's own keys.
        systems: name to the host's model arguments.
        template: the host's template.
    """
    config = {
        "task": values["task"],
        "task_dir": values["task_dir"].strip(),
        "directions": list(values["directions"]),
        "template": template,
        "systems": {name: dict(arguments) for name, arguments in systems.items()},
        "baseline": values["baseline"] or None,
        "teacher": TEACHER if TEACHER in systems else None,
        "metrics": list(values["metrics"]),
        "comet_model": values["comet_model"].strip() if _uses_comet(values["metrics"]) else None,
        "prompt": values["prompt"].strip(),
        "num_beams": int(values["num_beams"]),
        "max_new_tokens": int(values["max_new_tokens"]),
        "save_dir": values["save_dir"].strip(),
    }
    return {key: value for key, value in config.items() if value not in (None, "")}


def check_config(config: Mapping[str, Any]) -> None:
    """Check keys and test sets; :class:`EvaluationError` or :class:`DataError` for the first that cannot work."""
    settings = parse_settings(config, "Translation quality")
    for direction in settings.directions:
        if not load_test_set(settings.task, settings.task_dir, str(direction)).sources:
            raise DataError(f"The test set {settings.task} {direction} in {settings.task_dir} is empty.")


def as_yaml(config: Mapping[str, Any]) -> str:
    """Return the file's text, keys in the order in which they are explained."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _uses_comet(metrics: Iterable[str]) -> bool:
    return any(metric.startswith("comet") for metric in metrics)
