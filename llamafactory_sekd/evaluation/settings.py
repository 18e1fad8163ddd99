"""The keys of an evaluation's YAML file: types, defaults and every check that needs no file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamafactory_sekd.config import suggestion
from llamafactory_sekd.data.languages import Direction, parse_direction
from llamafactory_sekd.errors import DataError, EvaluationError, one_line


METRICS = ("bleu", "chrf", "comet")
BACKENDS = ("hf", "vllm")
# A directory below save_dir is named after the system.
_SYSTEM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class System:
    """One row of the tables: a model to translate with, or translations that are only scored.

    ``model`` holds the host's own model arguments (``model_name_or_path``, ``adapter_name_or_path``,
    ``infer_dtype``, …); ``hypotheses`` a directory with one ``<source>-<target>.txt`` per direction. Exactly one of
    them is set.
    """

    name: str
    model: Mapping[str, Any] | None = None
    hypotheses: Path | None = None


@dataclass(frozen=True)
class Decoding:
    """The generation keys, named as the host names them; together they decide the output of a model."""

    backend: str = "hf"
    num_beams: int = 1
    max_new_tokens: int = 256
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Settings:
    """A checked configuration. ``batch_size`` and ``batch_tokens`` change the speed, never the result."""

    task: str
    directions: tuple[Direction, ...]
    systems: tuple[System, ...]
    save_dir: Path
    task_dir: Path = Path("data/alma")
    template: str = "parrot"
    baseline: str | None = None
    teacher: str | None = None
    metrics: tuple[str, ...] = METRICS
    comet_optional: bool = True
    comet_model: str = "Unbabel/wmt22-comet-da"
    decoding: Decoding = field(default_factory=Decoding)
    batch_size: int | None = None
    batch_tokens: int = 16384
    seed: int = 42


_DECODING_KEYS = tuple(Decoding.__dataclass_fields__)
_KEYS = (
    *(name for name in Settings.__dataclass_fields__ if name not in ("decoding", "comet_optional")),
    *_DECODING_KEYS,
)
_REQUIRED = ("task", "directions", "systems", "save_dir")


def parse_settings(config: Mapping[str, Any], origin: str) -> Settings:
    """Check the keys of an evaluation and return them typed.

    ``origin`` names where ``config`` was read, for the messages. A key that is absent or null takes its default.
    Raises :class:`EvaluationError` with one line for the first key that cannot work.
    """
    for key in config:
        if key not in _KEYS:
            raise EvaluationError(f"{origin}: unknown key {key!r}{suggestion(str(key), _KEYS)}")
    given = {key: value for key, value in config.items() if value is not None}
    for key in _REQUIRED:
        if key not in given:
            raise EvaluationError(f"{origin}: the key `{key}` is missing.")

    systems = _systems(given["systems"])
    values: dict[str, Any] = {
        "task": _text(given, "task"),
        "save_dir": Path(_text(given, "save_dir")),
        "directions": _directions(given["directions"]),
        "systems": systems,
        "decoding": _decoding(given),
    }
    if "task_dir" in given:
        values["task_dir"] = Path(_text(given, "task_dir"))
    for key in ("template", "comet_model"):
        if key in given:
            values[key] = _text(given, key)
    for key, minimum in (("batch_size", 1), ("batch_tokens", 1), ("seed", 0)):
        if key in given:
            values[key] = _integer(given, key, minimum)
    for key in ("baseline", "teacher"):
        if key in given:
            values[key] = _among(given, key, systems)
    if "metrics" in given:
        values["metrics"], values["comet_optional"] = _metrics(given["metrics"])
    return Settings(**values)


def _text(given: Mapping[str, Any], key: str) -> str:
    value = given[key]
    if not isinstance(value, str) or not value.strip():
        raise EvaluationError(f"`{key}` must be text, not {value!r}.")
    return value


def _integer(given: Mapping[str, Any], key: str, minimum: int) -> int:
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise EvaluationError(f"`{key}` must be an integer of at least {minimum}, not {value!r}.")
    return value


def _number(given: Mapping[str, Any], key: str) -> float:
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EvaluationError(f"`{key}` must be a number, not {value!r}.")
    return float(value)


def _list(value: Any, key: str, example: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise EvaluationError(f"`{key}` must be a list such as {example}, not {value!r}.")
    repeated = next((item for index, item in enumerate(value) if item in value[:index]), None)
    if repeated is not None:
        raise EvaluationError(f"`{key}` names {repeated!r} twice.")
    return value


def _directions(value: Any) -> tuple[Direction, ...]:
    try:
        return tuple(parse_direction(text) for text in _list(value, "directions", "[en-de, de-en]"))
    except DataError as error:
        raise EvaluationError(f"`directions`: {one_line(str(error))}") from None


def _metrics(value: Any) -> tuple[tuple[str, ...], bool]:
    names = _list(value, "metrics", "[bleu, chrf, comet?]")
    for name in names:
        if name not in (*METRICS, "comet?"):
            raise EvaluationError(
                f"`metrics`: unknown metric {name!r}: use bleu, chrf, comet, or comet? to skip it if it cannot run."
            )
    plain = [name.removesuffix("?") for name in names]
    if len(set(plain)) < len(plain):
        raise EvaluationError("`metrics` names comet twice.")
    return tuple(name for name in METRICS if name in plain), "comet?" in names


def _decoding(given: Mapping[str, Any]) -> Decoding:
    values: dict[str, Any] = {}
    for key in ("num_beams", "max_new_tokens"):
        if key in given:
            values[key] = _integer(given, key, 1)
    for key in ("length_penalty", "repetition_penalty"):
        if key in given:
            values[key] = _number(given, key)
    if "repetition_penalty" in values and values["repetition_penalty"] <= 0:
        raise EvaluationError(f"`repetition_penalty` must be above 0, not {values['repetition_penalty']}.")
    if "backend" in given:
        values["backend"] = given["backend"]
        if given["backend"] not in BACKENDS:
            raise EvaluationError(f"`backend` must be hf or vllm, not {given['backend']!r}.")
    decoding = Decoding(**values)
    if decoding.backend == "vllm" and decoding.num_beams > 1:
        raise EvaluationError(f"`backend: vllm` decodes greedily: `num_beams` must be 1, not {decoding.num_beams}.")
    return decoding


def _systems(value: Any) -> tuple[System, ...]:
    if not isinstance(value, Mapping) or not value:
        raise EvaluationError("`systems` must map at least one name to its model or its hypotheses.")
    return tuple(_system(name, entry) for name, entry in value.items())


def _system(name: Any, entry: Any) -> System:
    if not isinstance(name, str) or _SYSTEM_NAME.fullmatch(name) is None:
        raise EvaluationError(f"`systems`: {name!r} cannot be a name: use letters, digits and . _ + - only.")
    if not isinstance(entry, Mapping):
        raise EvaluationError(f"`systems.{name}` must hold `model_name_or_path` or `hypotheses`, not {entry!r}.")
    keys = {key: value for key, value in entry.items() if value is not None}
    if ("model_name_or_path" in keys) == ("hypotheses" in keys):
        raise EvaluationError(f"`systems.{name}` needs either `model_name_or_path` or `hypotheses`.")
    if "hypotheses" in keys:
        extra = next((key for key in keys if key != "hypotheses"), None)
        if extra is not None:
            raise EvaluationError(f"`systems.{name}` is only scored: `{extra}` has no place next to `hypotheses`.")
        return System(name, hypotheses=Path(_text(keys, "hypotheses")))
    misplaced = next((key for key in keys if key in _KEYS and key != "template"), None)
    if misplaced is not None:
        raise EvaluationError(f"`systems.{name}.{misplaced}`: `{misplaced}` applies to all systems; move it up.")
    return System(name, model=keys)


def _among(given: Mapping[str, Any], key: str, systems: tuple[System, ...]) -> str:
    names = tuple(system.name for system in systems)
    if given[key] not in names:
        raise EvaluationError(f"`{key}` is {given[key]!r}, which is not among the systems: {', '.join(names)}.")
    return given[key]
