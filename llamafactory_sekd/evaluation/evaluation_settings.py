"""The keys of an evaluation's YAML file: types, defaults and every check that needs no file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamafactory_sekd.config import check_keys, text_of
from llamafactory_sekd.data.languages import Direction, parse_direction
from llamafactory_sekd.data.prompts import PARROT, Prompt, prompt_named
from llamafactory_sekd.errors import ArgumentError, DataError, EvaluationError, one_line, suggestion
from llamafactory_sekd.evaluation.scores import SURFACE_METRICS, TOKENIZERS, BleuTokenizer, metric_keys


# Metrics that are models, of which an evaluation may have several, and the one that is meant when none is named.
MODEL_METRICS = {"comet": "Unbabel/wmt22-comet-da", "metricx": ""}
METRICS = (*SURFACE_METRICS, *MODEL_METRICS)
# Those that may need the network: with a question mark, they are left out where they cannot run.
OPTIONAL = ("spbleu", *MODEL_METRICS)
BACKENDS = ("hf", "vllm")
TESTS = ("paired_bs", "paired_ar")
# A directory below save_dir is named after the system.
_SYSTEM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Examples:
    """Translations that a prompt shows before the sentence (few-shot).

    ``origin`` is a folder of ``<src>-<tgt>.<lang>`` files or the name of a test set; of its pairs, ``number`` are
    shown: the ``nearest`` to the sentence by chrF2, or the first ones.
    """

    origin: str
    number: int
    nearest: bool = True


@dataclass(frozen=True)
class System:
    """One row of the tables: a model to translate with, or translations that are only scored.

    ``model`` holds the host's own model arguments (``model_name_or_path``, ``adapter_name_or_path``,
    ``infer_dtype``, …); ``hypotheses`` a directory with one ``<source>-<target>.txt`` per direction. Exactly one of
    them is set. ``prompt`` and ``examples`` are what the model is asked; with ``document``, for all sentences of a
    document together (True), or for so many of them at most.
    """

    name: str
    model: Mapping[str, Any] | None = None
    hypotheses: Path | None = None
    prompt: Prompt = PARROT
    examples: Examples | None = None
    document: bool | int = False


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
    """A checked configuration. ``batch_size`` and ``batch_tokens`` change the speed, never the result.

    ``models`` maps each metric that is a model to its name or path, ``optional`` are the metrics that are left out
    where they cannot run.
    """

    task: str
    directions: tuple[Direction, ...]
    systems: tuple[System, ...]
    save_dir: Path
    task_dir: Path = Path("data/alma")
    template: str = "parrot"
    baseline: str | None = None
    teacher: str | None = None
    metrics: tuple[str, ...] = ("bleu", "chrf", "comet")
    optional: frozenset[str] = frozenset({"comet"})
    models: Mapping[str, str] = field(default_factory=lambda: {"comet": MODEL_METRICS["comet"]})
    bleu_tokenizer: BleuTokenizer = None
    significance: str = "paired_bs"
    decoding: Decoding = field(default_factory=Decoding)
    batch_size: int | None = None
    batch_tokens: int = 16384
    seed: int = 42


_DECODING_KEYS = tuple(Decoding.__dataclass_fields__)
_PROMPT_KEYS = ("prompt", "system_prompt", "examples", "document", "enable_thinking")
_KEYS = (
    *(name for name in Settings.__dataclass_fields__ if name not in ("decoding", "optional", "models")),
    *("comet", "comet_model", "metricx", "language_names"),
    *_PROMPT_KEYS,
    *_DECODING_KEYS,
)
_WHAT = ("model_name_or_path", "hypotheses")  # what a system is
_REQUIRED = ("task", "directions", "systems", "save_dir")


def parse_settings(config: Mapping[str, Any], origin: str) -> Settings:
    """Check the keys of an evaluation and return them typed.

    ``origin`` names where ``config`` was read, for the messages. A key that is absent or null takes its default.
    Raises :class:`EvaluationError` with one line for the first key that cannot work.
    """
    given = {key: value for key, value in config.items() if value is not None or key not in _KEYS}
    check_keys(given, _KEYS, _REQUIRED, origin, EvaluationError)
    systems = _systems(given["systems"], {key: given[key] for key in _PROMPT_KEYS if key in given})
    metrics, optional, models = _metrics(given)
    values: dict[str, Any] = {
        "task": _text(given, "task"),
        "save_dir": Path(_text(given, "save_dir")),
        "directions": _directions(given["directions"], given.get("language_names", {})),
        "systems": systems,
        "metrics": metrics,
        "optional": optional,
        "models": models,
        "decoding": _decoding(given),
    }
    if "task_dir" in given:
        values["task_dir"] = Path(_text(given, "task_dir"))
    if "template" in given:
        values["template"] = _text(given, "template")
    if "bleu_tokenizer" in given:
        values["bleu_tokenizer"] = _bleu_tokenizer(given["bleu_tokenizer"])
    if "significance" in given:
        values["significance"] = _one_of(given["significance"], "significance", TESTS)
    for key, minimum in (("batch_size", 1), ("batch_tokens", 1), ("seed", 0)):
        if key in given:
            values[key] = integer_of(given, key, minimum)
    for key in ("baseline", "teacher"):
        if key in given:
            values[key] = _among(given, key, systems)
    return Settings(**values)


def _text(given: Mapping[str, Any], key: str) -> str:
    return text_of(given, key, EvaluationError)


def integer_of(given: Mapping[str, Any], key: str, minimum: int) -> int:
    """Return a key's integer; :class:`EvaluationError` for anything else and for one below ``minimum``."""
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise EvaluationError(f"`{key}` must be an integer of at least {minimum}, not {value!r}.")
    return value


def truth_of(given: Mapping[str, Any], key: str, where: str = "") -> bool:
    """Return a key's truth value; :class:`EvaluationError`, which names ``where`` it is, for anything else."""
    if not isinstance(given[key], bool):
        raise EvaluationError(f"`{where}{key}` must be true or false, not {given[key]!r}.")
    return given[key]


def _one_of(value: Any, key: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise EvaluationError(f"`{key}` must be {' or '.join(known)}, not {value!r}.")
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


def _directions(value: Any, names: Any) -> tuple[Direction, ...]:
    if not isinstance(names, Mapping) or not all(isinstance(name, str) and name for name in names.values()):
        raise EvaluationError(f"`language_names` must map codes to names, such as {{nds: Low German}}, not {names!r}.")
    try:
        return tuple(_direction(text, names) for text in _list(value, "directions", "[en-de, de-en]"))
    except DataError as error:
        raise EvaluationError(
            f"`directions`: {one_line(str(error))} Here, `language_names: {{CODE: NAME}}` gives one."
            if "code" in str(error)
            else f"`directions`: {one_line(str(error))}"
        ) from None


def _direction(text: str, names: Mapping[str, str]) -> Direction:
    codes = parse_direction(text, "any", "any")
    return parse_direction(text, names.get(codes.source), names.get(codes.target))


def _metrics(given: Mapping[str, Any]) -> tuple[tuple[str, ...], frozenset[str], dict[str, str]]:
    """Return the metrics, those of them that are optional, and the models of those that are models."""
    asked = _asked_metrics(given.get("metrics", ["bleu", "chrf", "comet?"]))
    locations = {"comet": _models(given, "comet", "comet_model"), "metricx": _models(given, "metricx")}
    for kind, named in locations.items():
        if kind in given:
            asked.setdefault(kind, False)
        if not named and asked.get(kind) is False:
            raise EvaluationError(
                f"`metrics` has {kind}, so `{kind}` must name its model, such as google/metricx-24-hybrid-large-v2p6."
            )
    models: dict[str, str] = {}
    for kind, usual in MODEL_METRICS.items():
        if kind in asked:
            # `comet_model` is the COMET of the tables, whatever it is called.
            models |= metric_keys(kind, locations[kind], usual)
    metrics = (*(metric for metric in SURFACE_METRICS if metric in asked), *models)
    return metrics, frozenset(metric for metric in metrics if asked[metric.partition(":")[0]]), models


def _asked_metrics(value: Any) -> dict[str, bool]:
    """Return for each metric that is asked for whether it is left out where it cannot run."""
    asked: dict[str, bool] = {}
    for name in _list(value, "metrics", "[bleu, chrf, comet?]"):
        plain = name.removesuffix("?")
        if plain not in METRICS or (name != plain and plain not in OPTIONAL):
            raise EvaluationError(
                f"`metrics`: unknown metric {name!r}: use {', '.join(METRICS)}; a question mark, as in comet?, skips "
                f"{', '.join(OPTIONAL)} where it cannot run."
            )
        if plain in asked:
            raise EvaluationError(f"`metrics` names {plain} twice.")
        asked[plain] = name != plain
    return asked


def _models(given: Mapping[str, Any], key: str, single: str | None = None) -> list[str]:
    if key in given and single in given:
        raise EvaluationError(f"`{key}` and `{single}` are the same: name all models in `{key}`.")
    if single in given:
        return [_text(given, str(single))]
    if key in given:
        value = given[key]
        return [value] if isinstance(value, str) and value else _list(value, key, f"[{MODEL_METRICS['comet']}]")
    return [MODEL_METRICS[key]] if MODEL_METRICS[key] else []


def _bleu_tokenizer(value: Any) -> BleuTokenizer:
    chosen = list(value.values()) if isinstance(value, Mapping) else [value]
    wrong = next((one for one in chosen if one not in TOKENIZERS), None)
    if wrong is not None or not chosen:
        raise EvaluationError(
            f"`bleu_tokenizer` must be one of {', '.join(TOKENIZERS)}, or map target languages to them, not {value!r}."
        )
    return value


def _decoding(given: Mapping[str, Any]) -> Decoding:
    values: dict[str, Any] = {}
    for key in ("num_beams", "max_new_tokens"):
        if key in given:
            values[key] = integer_of(given, key, 1)
    for key in ("length_penalty", "repetition_penalty"):
        if key in given:
            values[key] = _number(given, key)
    if "repetition_penalty" in values and values["repetition_penalty"] <= 0:
        raise EvaluationError(f"`repetition_penalty` must be above 0, not {values['repetition_penalty']}.")
    if "backend" in given:
        values["backend"] = _one_of(given["backend"], "backend", BACKENDS)
    decoding = Decoding(**values)
    if decoding.backend == "vllm" and decoding.num_beams > 1:
        raise EvaluationError(f"`backend: vllm` decodes greedily: `num_beams` must be 1, not {decoding.num_beams}.")
    return decoding


def _systems(value: Any, shared: Mapping[str, Any]) -> tuple[System, ...]:
    if not isinstance(value, Mapping) or not value:
        raise EvaluationError("`systems` must map at least one name to its model or its hypotheses.")
    _asking(shared, "")  # a key that cannot work is named where it is
    return tuple(_system(name, entry, shared) for name, entry in value.items())


def _system(name: Any, entry: Any, shared: Mapping[str, Any]) -> System:
    if not isinstance(name, str) or _SYSTEM_NAME.fullmatch(name) is None:
        raise EvaluationError(f"`systems`: {name!r} cannot be a name: use letters, digits and . _ + - only.")
    if not isinstance(entry, Mapping):
        raise EvaluationError(f"`systems.{name}` must hold `model_name_or_path` or `hypotheses`, not {entry!r}.")
    keys = {key: value for key, value in entry.items() if value is not None}
    if not any(key in keys for key in _WHAT):
        _check_spelling(name, keys)
    if ("model_name_or_path" in keys) == ("hypotheses" in keys):
        raise EvaluationError(f"`systems.{name}` needs either `model_name_or_path` or `hypotheses`.")
    if "hypotheses" in keys:
        extra = next((key for key in keys if key != "hypotheses"), None)
        if extra is not None:
            raise EvaluationError(f"`systems.{name}` is only scored: `{extra}` has no place next to `hypotheses`.")
        return System(name, hypotheses=Path(_text(keys, "hypotheses")))
    own = (*_PROMPT_KEYS, "template")
    misplaced = next((key for key in keys if key in _KEYS and key not in own), None)
    if misplaced is not None:
        raise EvaluationError(f"`systems.{name}.{misplaced}`: `{misplaced}` applies to all systems; move it up.")
    if "system_prompt" in keys and "default_system" in keys:
        raise EvaluationError(f"`systems.{name}`: `system_prompt` and `default_system` are the same: use one of them.")
    asked = {**shared, **{key: entry[key] for key in _PROMPT_KEYS if key in entry}}  # null takes back what is shared
    given = {key: value for key, value in asked.items() if value is not None}
    prompt, examples, document, arguments = _asking(given, f"systems.{name}.")
    model = {key: item for key, item in keys.items() if key not in _PROMPT_KEYS}
    return System(name, model={**arguments, **model}, prompt=prompt, examples=examples, document=document)


def _check_spelling(name: str, keys: Mapping[str, Any]) -> None:
    for key in keys:
        meant = suggestion(str(key), _WHAT)
        if "did you mean" in meant:
            raise EvaluationError(f"`systems.{name}`: unknown key {key!r}{meant}")


def _asking(given: Mapping[str, Any], where: str) -> tuple[Prompt, Examples | None, bool | int, dict[str, Any]]:
    """Return the prompt, the examples, how much of a document, and what the host calls the rest of these keys."""
    arguments: dict[str, Any] = {}
    if "system_prompt" in given:
        arguments["default_system"] = _text(given, "system_prompt")
    if "enable_thinking" in given:
        arguments["enable_thinking"] = truth_of(given, "enable_thinking", where)
    try:
        prompt = prompt_named(_text(given, "prompt") if "prompt" in given else None)
    except ArgumentError as error:
        raise EvaluationError(f"`{where}prompt`: {one_line(str(error))}") from None
    examples = _examples(given["examples"], f"{where}examples") if "examples" in given else None
    document = given.get("document", False)
    if not isinstance(document, int) or (document is not True and document is not False and document < 2):
        raise EvaluationError(f"`{where}document` must be true, false, or a number of sentences, not {document!r}.")
    return prompt, examples, document, arguments


def _examples(value: Any, key: str) -> Examples:
    form = "{from: FOLDER, number: 3, choose: nearest}"
    if not isinstance(value, Mapping) or not {"from", "number"} <= set(value) <= {"from", "number", "choose"}:
        raise EvaluationError(f"`{key}` must be like {form}, not {value!r}.")
    choose = _one_of(value.get("choose", "nearest"), f"{key}.choose", ("nearest", "first"))
    return Examples(_text(value, "from"), integer_of(value, "number", 1), choose == "nearest")


def _among(given: Mapping[str, Any], key: str, systems: tuple[System, ...]) -> str:
    names = tuple(system.name for system in systems)
    if given[key] not in names:
        raise EvaluationError(f"`{key}` is {given[key]!r}, which is not among the systems: {', '.join(names)}.")
    return given[key]
