"""A study file: its keys, typed and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.config import check_keys, read_config, text_of
from llamafactory_sekd.errors import StudyError, one_line, suggestion
from llamafactory_sekd.evaluation.evaluation_settings import METRICS


BASE = "base"
_REQUIRED = ("output_dir", "train", "systems")
# What a cell gets from the study itself.
RESERVED = ("output_dir", "overwrite_output_dir", "seed", "resume_from_checkpoint")
_SELECT_KEYS = ("key", "metric", "mode", "evaluation")
_CACHE_KEYS = ("folder", "format", "k", "dtype", "batch_size")


@dataclass(frozen=True)
class TeacherCache:
    """One pass of the teacher for all cells: its folder, and the options of ``sekd cache``."""

    folder: Path
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Select:
    """The key of the matrix whose best value is chosen per system, by which validation metric, ``min`` or ``max``.

    ``evaluation`` is the YAML of a validation set, where the metric is one of an evaluation's: BLEU, chrF2, COMET.
    """

    key: str
    metric: str
    mode: str
    evaluation: Path | None = None


@dataclass(frozen=True)
class Spec:
    """A checked study file. ``effective`` is all of it as plain values, its base and the overrides merged in.

    Without an ``evaluation`` the validation metrics of the trainings are the judge.
    """

    name: str
    effective: Mapping[str, Any]
    output_dir: Path
    prepare: tuple[str, ...]
    train: Path
    evaluation: Path | None
    teacher_cache: TeacherCache | None
    overrides: Mapping[str, Any]
    systems: Mapping[str, Mapping[str, Any]]
    models: Mapping[str, Mapping[str, Any]]
    matrix: Mapping[str, Sequence[Any]]
    seeds: tuple[int, ...]
    baseline: str | None
    teacher: str | None
    select: Select | None


KEYS = tuple(name for name in Spec.__dataclass_fields__ if name not in ("name", "effective"))


def read_spec(path: Path, overrides: Sequence[str] = ()) -> Spec:
    """Read a study file with the overrides ``key=value`` of the command line.

    ``base: other.yaml`` takes another study's keys first, a list of them in its order. A key, a system or a model that
    is null is left out. Raises :class:`StudyError`, one line, for the first thing that cannot work.
    """
    return parse_spec(_merged(path, overrides), path)


def _merged(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for file in _lineage(path, ()):
        config = read_config(file, overrides if file == path else (), beneath=config, error=StudyError)
    return {key: value for key, value in config.items() if key != BASE and value is not None}


def _lineage(path: Path, above: tuple[Path, ...]) -> list[Path]:
    """Return the bases of a study file, theirs first, and the file itself at the end."""
    if path in above:
        raise StudyError(f"{above[-1]}: `{BASE}: {path}` leads back to itself.")
    bases = read_config(path, error=StudyError).get(BASE)
    names = [bases] if isinstance(bases, str) else bases or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise StudyError(f"{path}: `{BASE}` must be the path of a study file, or a list of them, not {bases!r}.")
    return [*(file for name in names for file in _lineage(Path(name), (*above, path))), path]


def parse_spec(config: Mapping[str, Any], path: Path) -> Spec:
    """Check the keys of a study and return them typed; ``path`` is named in messages."""
    try:
        return _parse_spec(config, path)
    except StudyError as error:  # it quotes keys and values of the user's, line breaks and all
        raise StudyError(one_line(str(error))) from None


def _parse_spec(config: Mapping[str, Any], path: Path) -> Spec:
    check_keys(config, KEYS, _REQUIRED, path, StudyError)
    systems = _mappings(config, "systems")
    models = _mappings(config, "models") if "models" in config else {}
    matrix = _matrix(config.get("matrix", {}))
    _check_names(systems, models)
    if "evaluation" not in config and models:
        raise StudyError(
            "`models` are only evaluated, so they need `evaluation`, the YAML of an evaluation; without one the "
            "validation metrics of the trainings are compared."
        )
    return Spec(
        name=path.stem,
        effective={**config, "systems": systems, **({"models": models} if models else {})},
        output_dir=Path(text_of(config, "output_dir", StudyError)),
        prepare=tuple(_commands(config.get("prepare", []))),
        train=Path(text_of(config, "train", StudyError)),
        evaluation=Path(text_of(config, "evaluation", StudyError)) if "evaluation" in config else None,
        teacher_cache=_teacher_cache(config.get("teacher_cache")),
        overrides=_cell_keys(config.get("overrides", {}), "overrides"),
        systems={name: _cell_keys(entry, f"systems.{name}") for name, entry in systems.items()},
        models=models,
        matrix=matrix,
        seeds=tuple(_seeds(config.get("seeds", [42]))),
        baseline=_among(config, "baseline", [*systems, *models]),
        teacher=_among(config, "teacher", list(models)),
        select=_select(config.get("select"), matrix),
    )


def _mappings(config: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    value = config[key]
    if not isinstance(value, Mapping):
        raise StudyError(f"`{key}` must map names to keys and values, not {value!r}.")
    kept = {name: entry for name, entry in value.items() if entry is not None}
    if not kept and key == "systems":
        raise StudyError("`systems` must name at least one system.")
    for name, entry in kept.items():
        if not isinstance(name, str) or not name.strip():
            raise StudyError(f"`{key}`: {name!r} cannot be a name: write it in quotes.")
        if not isinstance(entry, Mapping):
            raise StudyError(f"`{key}.{name}` must hold keys and values ({{}} for none), not {entry!r}.")
    return {name: dict(entry) for name, entry in kept.items()}


def _check_names(systems: Mapping[str, Any], models: Mapping[str, Any]) -> None:
    both = next((name for name in models if name in systems), None)
    if both is not None:
        raise StudyError(f"`models.{both}` has the name of a system: choose another one.")
    for name, entry in models.items():
        if not isinstance(entry.get("model_name_or_path"), str):
            raise StudyError(f"`models.{name}` needs `model_name_or_path`, a path or a hub id.")


def _cell_keys(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise StudyError(f"`{place}` must hold keys and values, not {value!r}.")
    taken = next((key for key in RESERVED if key in value), None)
    if taken is not None:
        remedy = "use `seeds`" if taken == "seed" else "the study sets it for every cell"
        raise StudyError(f"`{place}.{taken}` cannot be set: {remedy}.")
    return {str(key): entry for key, entry in value.items()}


def _matrix(value: Any) -> dict[str, list[Any]]:
    matrix = _cell_keys(value, "matrix")
    for key, values in matrix.items():
        if key in ("train", "text", "mix"):
            raise StudyError(f"`matrix.{key}` cannot be varied: write a system with its own `{key}` for each value.")
        if not isinstance(values, list) or not values:
            raise StudyError(f"`matrix.{key}` must be a list of values, not {values!r}.")
        repeated = next((item for index, item in enumerate(values) if _same_in(item, values[:index])), None)
        if repeated is not None:
            raise StudyError(f"`matrix.{key}` names {repeated!r} twice.")
    return matrix


def _same_in(item: Any, others: list[Any]) -> bool:
    return any(item == other and isinstance(item, bool) == isinstance(other, bool) for other in others)


def _seeds(value: Any) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(seed) is int and seed >= 0 for seed in value):
        raise StudyError(f"`seeds` must be a list of integers such as [42, 1, 2], not {value!r}.")
    if len(set(value)) < len(value):
        raise StudyError(f"`seeds` names a seed twice: {value!r}.")
    return value


def _commands(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(command, str) and command.strip() for command in value):
        raise StudyError(f"`prepare` must be a list of commands such as [sekd demo --prepare], not {value!r}.")
    return value


def _among(config: Mapping[str, Any], key: str, names: list[str]) -> str | None:
    value = config.get(key)
    if value is not None and value not in names:
        where = "`models`" if key == "teacher" else "`systems` and `models`"
        raise StudyError(f"`{key}` is {value!r}, which is not among {where}: {', '.join(names) or 'there are none'}.")
    return value


def _teacher_cache(value: Any) -> TeacherCache | None:
    if value is None:
        return None
    options = {"folder": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping) or not isinstance(options.get("folder"), str):
        raise StudyError(f"`teacher_cache` must be a folder, or {{folder: …, format: …}}, not {value!r}.")
    unknown = next((key for key in options if key not in _CACHE_KEYS), None)
    if unknown is not None:
        raise StudyError(f"`teacher_cache.{unknown}` is unknown{suggestion(str(unknown), _CACHE_KEYS)}")
    kept = {key: option for key, option in options.items() if key != "folder" and option is not None}
    return TeacherCache(Path(options["folder"]), kept)


def _select(value: Any, matrix: Mapping[str, Any]) -> Select | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or set(value) - set(_SELECT_KEYS) or "key" not in value:
        raise StudyError(f"`select` must be {{key: …, metric: nll, mode: min}}, not {value!r}.")
    metric = value.get("metric", "nll")
    translated = metric in METRICS
    mode = value.get("mode", "max" if translated else "min")
    if translated != ("evaluation" in value):
        if translated:
            raise StudyError(
                f"`select.metric: {metric}` needs `select.evaluation`, the evaluation YAML of a validation set, such "
                "as examples/yamls/eval_wmt21.yaml."
            )
        raise StudyError(f"`select.evaluation` has no effect on `metric: {metric}`: use {', '.join(METRICS)}.")
    evaluation = Path(text_of(value, "evaluation", StudyError)) if translated else None
    select = Select(value["key"], metric, mode, evaluation)
    if select.key not in matrix:
        raise StudyError(f"`select.key` is {select.key!r}, which is not a key of `matrix`.")
    if select.mode not in ("min", "max"):
        raise StudyError(f"`select.mode` must be min or max, not {select.mode!r}.")
    return select
