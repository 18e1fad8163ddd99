"""A study file: its keys, typed and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictInt, ValidationInfo, model_validator

from llamafactory_sekd.config import read_config
from llamafactory_sekd.errors import StudyError
from llamafactory_sekd.evaluation.evaluation_settings import METRICS
from llamafactory_sekd.keys import Folder, Keys, Text, check_keys, must


BASE = "base"
# What a cell gets from the study itself.
RESERVED = ("output_dir", "overwrite_output_dir", "seed", "resume_from_checkpoint")


def _named(value: Any, info: ValidationInfo) -> dict[str, dict[Any, Any]]:
    key = info.field_name
    if not isinstance(value, Mapping):
        raise ValueError(f"must map names to keys and values, not {value!r}.")
    kept = {name: entry for name, entry in value.items() if entry is not None}
    for name, entry in kept.items():
        if not isinstance(name, str) or not name.strip():
            raise StudyError(f"`{key}`: {name!r} cannot be a name: write it in quotes.")
        if not isinstance(entry, Mapping):
            raise StudyError(f"`{key}.{name}` must hold keys and values ({{}} for none), not {entry!r}.")
    return {name: dict(entry) for name, entry in kept.items()}


def _systems(value: Any, info: ValidationInfo) -> dict[str, dict[str, Any]]:
    systems = _named(value, info)
    if not systems:
        raise ValueError("must name at least one system.")
    return {name: _cell_keys(entry, f"systems.{name}") for name, entry in systems.items()}


def _models(value: Any, info: ValidationInfo) -> dict[str, dict[Any, Any]]:
    models = _named(value, info)
    for name, entry in models.items():
        if not isinstance(entry.get("model_name_or_path"), str):
            raise StudyError(f"`models.{name}` needs `model_name_or_path`, a path or a hub id.")
    return models


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


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"names a seed twice: {list(seeds)}.")
    return seeds


# Text of digits as well: it goes to a command line.
_Count = Annotated[int, Field(ge=1), must("be an integer of at least 1")]


class TeacherCache(Keys):
    """One pass of the teacher for all cells: its folder, and the options of ``sekd cache``."""

    folder: Folder
    format: Text | None = None
    k: _Count | None = None
    dtype: Text | None = None
    batch_size: _Count | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options that are given."""
        return self.model_dump(exclude={"folder"}, exclude_none=True)


class Select(Keys):
    """The key of the matrix whose best value is chosen per system, by which validation metric, ``min`` or ``max``.

    ``evaluation`` is the YAML of a validation set, where the metric is one of an evaluation's: BLEU, chrF2, COMET.
    """

    key: Text
    metric: Text = "nll"
    mode: Literal["min", "max"] = "min"
    evaluation: Folder | None = None

    @model_validator(mode="before")
    @classmethod
    def _usual_mode(cls, given: Any) -> Any:
        usual = isinstance(given, Mapping) and given.get("metric") in METRICS and given.get("mode") is None
        return {**given, "mode": "max"} if usual else given

    @model_validator(mode="after")
    def _judged(self) -> Select:
        if self.metric in METRICS and self.evaluation is None:
            raise StudyError(
                f"`select.metric: {self.metric}` needs `select.evaluation`, the evaluation YAML of a validation set, "
                "such as examples/yamls/eval_wmt21.yaml."
            )
        if self.metric not in METRICS and self.evaluation is not None:
            metrics = ", ".join(METRICS)
            raise StudyError(f"`select.evaluation` has no effect on `metric: {self.metric}`: use {metrics}.")
        return self


class StudyKeys(Keys):
    """A study's YAML file, its base merged in.

    Without an ``evaluation`` the validation metrics of the trainings are the judge.
    """

    output_dir: Folder = Field(description="Where everything goes.")
    prepare: Annotated[tuple[Text, ...], must("be a list of commands such as [sekd demo --prepare]")] = Field(
        (), description="Commands that run once, before everything."
    )
    train: Folder = Field(description="The training YAML that every run starts from.")
    evaluation: Folder | None = Field(
        None, description="Test sets, metrics and decoding; without it, validation judges."
    )
    teacher_cache: (
        Annotated[
            TeacherCache,
            BeforeValidator(lambda value: {"folder": value} if isinstance(value, str) else value),
            must("be a folder, or {folder: …, format: …}"),
        ]
        | None
    ) = Field(None, description="One pass of the teacher for all runs.")
    overrides: Annotated[dict[str, Any], BeforeValidator(lambda value: _cell_keys(value, "overrides"))] = Field({})
    systems: Annotated[dict[str, dict[str, Any]], BeforeValidator(_systems)] = Field(
        description="Name -> keys in place of the training YAML's."
    )
    models: Annotated[dict[str, dict[Any, Any]], BeforeValidator(_models)] = Field(
        {}, description="Models that are only evaluated."
    )
    matrix: Annotated[dict[str, list[Any]], BeforeValidator(_matrix)] = Field(
        {}, description="Training key -> values; every combination runs."
    )
    seeds: Annotated[
        tuple[Annotated[StrictInt, Field(ge=0)], ...],
        Field(min_length=1, json_schema_extra={"uniqueItems": True}),
        AfterValidator(_distinct),
        must("be a list of integers such as [42, 1, 2]"),
    ] = (42,)
    baseline: Text | None = Field(None, description="The system that differences and significance are against.")
    teacher: Text | None = Field(None, description="One of `models`: similarity is to its translations.")
    select: Annotated[Select, must("be {key: …, metric: nll, mode: min}")] | None = Field(
        None, description="Each system at its own best value of a key of the matrix, by a validation metric."
    )

    @model_validator(mode="after")
    def _names(self) -> StudyKeys:
        both = next((name for name in self.models if name in self.systems), None)
        if both is not None:
            raise StudyError(f"`models.{both}` has the name of a system: choose another one.")
        if self.models and self.evaluation is None:
            raise StudyError(
                "`models` are only evaluated, so they need `evaluation`, the YAML of an evaluation; without one the "
                "validation metrics of the trainings are compared."
            )
        for key, where, names in (
            ("baseline", "`systems` and `models`", [*self.systems, *self.models]),
            ("teacher", "`models`", list(self.models)),
        ):
            name = getattr(self, key)
            if name is not None and name not in names:
                known = ", ".join(names) or "there are none"
                raise StudyError(f"`{key}` is {name!r}, which is not among {where}: {known}.")
        if self.select is not None and self.select.key not in self.matrix:
            raise StudyError(f"`select.key` is {self.select.key!r}, which is not a key of `matrix`.")
        return self


KEYS = tuple(StudyKeys.names())


class Spec(StudyKeys):
    """A checked study file. ``effective`` is all of it as plain values, its base and the overrides merged in."""

    name: str
    effective: Mapping[str, Any]


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
    keys = check_keys(StudyKeys, config, path, StudyError)
    effective = {**config, "systems": keys.systems, **({"models": keys.models} if keys.models else {})}
    return Spec.model_construct(**dict(keys), name=path.stem, effective=effective)
