"""The keys of an evaluation's YAML file: types, defaults and every check that needs no file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    TypeAdapter,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from llamafactory_sekd.data.languages import Direction, parse_direction
from llamafactory_sekd.data.prompts import PARROT, Prompt, prompt_named
from llamafactory_sekd.errors import DataError, EvaluationError, suggestion
from llamafactory_sekd.evaluation.scores import SURFACE_METRICS, TOKENIZERS, BleuTokenizer, metric_keys
from llamafactory_sekd.keys import Count, Folder, Keys, Number, Text, Texts, check_keys, must


# Metrics that are models, of which an evaluation may have several, and the one that is meant when none is named.
MODEL_METRICS = {"comet": "Unbabel/wmt22-comet-da", "metricx": ""}
METRICS = (*SURFACE_METRICS, *MODEL_METRICS)
# Those that may need the network: with a question mark, they are left out where they cannot run.
OPTIONAL = ("spbleu", *MODEL_METRICS)
# A directory below save_dir is named after the system.
_SYSTEM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_WHAT = {"model_name_or_path", "hypotheses"}  # what a system is
_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1, "uniqueItems": True}


def _prompt(value: Any) -> Prompt:
    return prompt_named(TypeAdapter(Text).validate_python(value))


def _directions(value: Any, info: ValidationInfo) -> tuple[Direction, ...]:
    texts: list[str] = TypeAdapter(Annotated[Texts, must("be a list such as [en-de, de-en]")]).validate_python(value)
    names = info.data.get("language_names", {})
    try:
        codes = [parse_direction(text, "any", "any") for text in texts]
        return tuple(parse_direction(str(one), names.get(one.source), names.get(one.target)) for one in codes)
    except DataError as error:
        hint = " Here, `language_names: {CODE: NAME}` gives one." if "code" in str(error) else ""
        raise DataError(f"{error}{hint}") from None


def _known_metrics(names: list[str]) -> list[str]:
    for name in names:
        plain = name.removesuffix("?")
        if plain not in METRICS or (name != plain and plain not in OPTIONAL):
            raise EvaluationError(
                f"`metrics`: unknown metric {name!r}: use {', '.join(METRICS)}; a question mark, as in comet?, skips "
                f"{', '.join(OPTIONAL)} where it cannot run."
            )
    twice = next((name for name in names if f"{name}?" in names), None)
    if twice is not None:
        raise EvaluationError(f"`metrics` names {twice} twice.")
    return names


def _bleu_tokenizer(value: Any) -> BleuTokenizer:
    chosen = list(value.values()) if isinstance(value, Mapping) else [value]
    if not chosen or any(one not in (*TOKENIZERS, None) for one in chosen):
        raise ValueError(f"must be one of {', '.join(TOKENIZERS)}, or map target languages to them, not {value!r}.")
    return value


_TOKENIZER = {"enum": list(TOKENIZERS)}
_TOKENIZERS = {"anyOf": [_TOKENIZER, {"type": "object", "additionalProperties": _TOKENIZER}]}
_Models = Annotated[
    Texts,
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    must(f"be a list such as [{MODEL_METRICS['comet']}]"),
    WithJsonSchema({"anyOf": [_TEXT, _TEXTS]}),
]


class Examples(Keys):
    """Translations that a prompt shows before the sentence (few-shot).

    ``origin`` is a folder of ``<src>-<tgt>.<lang>`` files or the name of a test set; of its pairs, ``number`` are
    shown: the nearest to the sentence by chrF2, or the first ones.
    """

    origin: Text = Field(alias="from")
    number: Count
    choose: Literal["nearest", "first"] = "nearest"


class Asking(Keys):
    """What a model is asked: for all systems, or for one."""

    prompt: Annotated[Prompt, PlainValidator(_prompt), WithJsonSchema(_TEXT)] = Field(
        PARROT, description="parrot, plain, or a text with {source} and other fields."
    )
    system_prompt: Text | None = Field(None, description="In place of the template's own.")
    examples: Annotated[Examples, must("be like {from: FOLDER, number: 3, choose: nearest}")] | None = Field(
        None, description="Translations to show before the sentence."
    )
    document: Annotated[
        StrictBool | Annotated[StrictInt, Field(ge=2)], must("be true, false, or a number of sentences")
    ] = Field(False, description="The sentences of a document together, or so many of them at most.")
    enable_thinking: Annotated[StrictBool, must("be true or false")] | None = Field(
        None, description="Of templates with thoughts."
    )


class Scored(Keys):
    """A system that is only scored."""

    hypotheses: Folder = Field(description="Folder of <src>-<tgt>.txt files.")


class Decoding(Keys):
    """The generation keys, named as the host names them; together they decide the output of a model."""

    backend: Literal["hf", "vllm"] = "hf"
    num_beams: Count = Field(1, description="1 is greedy.")
    max_new_tokens: Count = 256
    length_penalty: Number = Field(1.0, description="For beam search.")
    repetition_penalty: Annotated[StrictFloat, Field(gt=0), must("be a number above 0")] = 1.0

    @model_validator(mode="after")
    def _greedy(self) -> Decoding:
        if self.backend == "vllm" and self.num_beams > 1:
            raise EvaluationError(f"`backend: vllm` decodes greedily: `num_beams` must be 1, not {self.num_beams}.")
        return self


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


class _Plain(Keys):
    """The keys that settings hold as they are. ``batch_size`` and ``batch_tokens`` change the speed, no result."""

    task: Text = Field(
        description="wmt22, wmt21_valid, a test set of sacrebleu, a folder of your own, or lm_eval:TASK,TASK."
    )
    language_names: Annotated[dict[str, Text], must("map codes to names, such as {nds: Low German}")] = Field(
        {}, description="Code -> the language's name in the prompt."
    )
    directions: Annotated[tuple[Direction, ...], PlainValidator(_directions), WithJsonSchema(_TEXTS)] = Field(
        description="Such as [en-de, de-en]."
    )
    save_dir: Folder = Field(description="Where everything goes.")
    task_dir: Folder = Field(Path("data/alma"), description="Folder of the test sets.")
    template: Text = Field("parrot", description="A template of LLaMA-Factory; a system may name its own.")
    baseline: Text | None = Field(None, description="The system that differences and significance are against.")
    teacher: Text | None = Field(None, description="The system whose translations similarity is measured to.")
    bleu_tokenizer: Annotated[BleuTokenizer, PlainValidator(_bleu_tokenizer), WithJsonSchema(_TOKENIZERS)] = Field(
        None, description="BLEU's tokenizer, or target language -> tokenizer."
    )
    significance: Literal["paired_bs", "paired_ar"] = Field(
        "paired_bs", description="Paired bootstrap or approximate randomization."
    )
    batch_tokens: Count = Field(16384, description="Tokens of prompt and output decoded at a time, over all beams.")
    batch_size: Count | None = Field(None, description="A limit in sentences in addition to `batch_tokens`.")
    seed: Annotated[StrictInt, Field(ge=0), must("be an integer of at least 0")] = 42


class EvaluationKeys(Asking, Decoding, _Plain):
    """An evaluation's YAML file."""

    systems: Annotated[
        dict[Any, Any], Field(min_length=1), must("map at least one name to its model or its hypotheses")
    ] = Field(description="Name -> a model, or translations that are only scored.")
    metrics: Annotated[Texts, AfterValidator(_known_metrics), must("be a list such as [bleu, chrf, comet?]")] = Field(
        ["bleu", "chrf", "comet?"],
        description="`comet?` is COMET where it can run, and a note where not.",
        json_schema_extra={"items": {"enum": [*METRICS, *(f"{metric}?" for metric in OPTIONAL)]}},
    )
    comet: _Models | None = Field(None, description="COMET models of any kind: names on the Hub or paths.")
    comet_model: Text | None = Field(
        None, description="The only COMET model: a name on the Hub, a checkpoint, or a folder."
    )
    metricx: _Models | None = Field(None, description="MetricX models: names on the Hub or folders.")


class Settings(_Plain):
    """A checked configuration.

    ``models`` maps each metric that is a model to its name or path, ``optional`` are the metrics that are left out
    where they cannot run.
    """

    systems: tuple[System, ...]
    metrics: tuple[str, ...] = ("bleu", "chrf", "comet")
    optional: frozenset[str] = frozenset({"comet"})
    models: Mapping[str, str] = {"comet": MODEL_METRICS["comet"]}
    decoding: Decoding = Decoding()


def parse_settings(config: Mapping[str, Any], origin: str) -> Settings:
    """Check the keys of an evaluation and return them typed.

    ``origin`` names where ``config`` was read, for the messages. A key that is absent or null takes its default.
    Raises :class:`EvaluationError` with one line for the first key that cannot work.
    """
    keys = check_keys(EvaluationKeys, config, origin, EvaluationError)
    systems = tuple(_system(name, entry, config) for name, entry in keys.systems.items())
    for key, value in (("baseline", keys.baseline), ("teacher", keys.teacher)):
        if value is not None and value not in keys.systems:
            raise EvaluationError(f"`{key}` is {value!r}, which is not among the systems: {', '.join(keys.systems)}.")
    metrics, optional, models = _metrics(keys)
    return Settings.model_construct(
        **{name: getattr(keys, name) for name in _Plain.model_fields},
        systems=systems,
        metrics=metrics,
        optional=optional,
        models=models,
        decoding=Decoding(**keys.model_dump(include=set(Decoding.model_fields))),
    )


def _metrics(keys: EvaluationKeys) -> tuple[tuple[str, ...], frozenset[str], dict[str, str]]:
    """Return the metrics, those of them that are optional, and the models of those that are models."""
    if keys.comet is not None and keys.comet_model is not None:
        raise EvaluationError("`comet` and `comet_model` are the same: name all models in `comet`.")
    asked = list(keys.metrics)
    named = {"comet": keys.comet or [], "metricx": keys.metricx or []}
    asked += [kind for kind in named if named[kind] and kind not in asked and f"{kind}?" not in asked]
    named["comet"] = named["comet"] or [keys.comet_model or MODEL_METRICS["comet"]]
    if "metricx" in asked and not named["metricx"]:
        raise EvaluationError(
            "`metrics` has metricx, so `metricx` must name its model, such as google/metricx-24-hybrid-large-v2p6."
        )
    kinds = {name.removesuffix("?") for name in asked}
    models: dict[str, str] = {}
    for kind, usual in MODEL_METRICS.items():
        if kind in kinds:
            # `comet_model` is the COMET of the tables, whatever it is called.
            models |= metric_keys(kind, named[kind], usual)
    metrics = (*(metric for metric in SURFACE_METRICS if metric in kinds), *models)
    return metrics, frozenset(one for one in metrics if f"{one.partition(':')[0]}?" in asked), models


def _system(name: Any, entry: Any, shared: Mapping[str, Any]) -> System:
    if not isinstance(name, str) or _SYSTEM_NAME.fullmatch(name) is None:
        raise EvaluationError(f"`systems`: {name!r} cannot be a name: use letters, digits and . _ + - only.")
    if not isinstance(entry, Mapping):
        raise EvaluationError(f"`systems.{name}` must hold `model_name_or_path` or `hypotheses`, not {entry!r}.")
    keys, where = {key: value for key, value in entry.items() if value is not None}, f"systems.{name}."
    if keys.keys().isdisjoint(_WHAT):
        for key in keys:
            if "did you mean" in (meant := suggestion(str(key), _WHAT)):
                raise EvaluationError(f"`systems.{name}`: unknown key {key!r}{meant}")
    if keys.keys().isdisjoint(_WHAT) or keys.keys() >= _WHAT:
        raise EvaluationError(f"`systems.{name}` needs either `model_name_or_path` or `hypotheses`.")
    if "hypotheses" in keys:
        extra = next((key for key in keys if key != "hypotheses"), None)
        if extra is not None:
            raise EvaluationError(f"`systems.{name}` is only scored: `{extra}` has no place next to `hypotheses`.")
        return System(name, hypotheses=check_keys(Scored, keys, name, EvaluationError, where).hypotheses)
    own = (*Asking.names(), "template")
    misplaced = next((key for key in keys if key in EvaluationKeys.names() and key not in own), None)
    if misplaced is not None:
        raise EvaluationError(f"`systems.{name}.{misplaced}`: `{misplaced}` applies to all systems; move it up.")
    if "system_prompt" in keys and "default_system" in keys:
        raise EvaluationError(f"`systems.{name}`: `system_prompt` and `default_system` are the same: use one of them.")
    asked = {key: entry.get(key, shared.get(key)) for key in Asking.names()}  # null takes back what is shared
    asking = check_keys(Asking, asked, name, EvaluationError, where)
    model = {"default_system": asking.system_prompt, "enable_thinking": asking.enable_thinking}
    model = {key: value for key, value in model.items() if value is not None}
    model |= {key: value for key, value in keys.items() if key not in Asking.names()}
    return System(name, model, prompt=asking.prompt, examples=asking.examples, document=asking.document)
