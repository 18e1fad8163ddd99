"""JSON schemas of the three kinds of YAML files, so that editors complete and check them, and ``sekd schema``."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import typer

from llamafactory_sekd.evaluation.evaluation_settings import BACKENDS, METRICS, OPTIONAL, TESTS, Decoding, Settings
from llamafactory_sekd.evaluation.scores import TOKENIZERS
from llamafactory_sekd.files import write_atomic
from llamafactory_sekd.formula import DIVERGENCES, PARAMETERS, SIGNALS, TARGETS
from llamafactory_sekd.presets import PRESET_KEY, PRESETS


app = typer.Typer(help="Write JSON schemas of the YAML files, for editors.", add_completion=False)
Schema = dict[str, Any]
TRAINING, EVALUATION, STUDY = "training.json", "evaluation.json", "study.json"
_PLAIN: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_TEXT: Schema = {"type": "string"}
_TEXTS: Schema = {"type": "array", "items": _TEXT, "minItems": 1, "uniqueItems": True}
_COUNT: Schema = {"type": "integer", "minimum": 1}


@app.command()
def schema(
    folder: Annotated[Path, typer.Argument(help="Where the three files go.")] = Path("docs/schema"),
) -> None:
    """Write the schemas of training, evaluation and study files.

    An editor with YAML support uses the one that a file's first line names:
    # yaml-language-server: $schema=../../docs/schema/training.json
    """
    for name, text in schema_files().items():
        write_atomic(folder / name, text.encode("utf-8"))
        print(folder / name)


# Whose text a system of a study trains on.
_WHOSE_TEXT: dict[str, Any] = {
    "text": {
        "type": ["string", "object"],
        "description": "teacher, or options of `sekd translate`: train on the translations of the study's teacher.",
    },
    "mix": {
        "type": "number",
        "description": "The share of the examples that get them; the others keep the reference.",
    },
}


def schema_files() -> dict[str, str]:
    """Return the text of each file by its name."""
    training = training_schema()
    schemas = {TRAINING: training, EVALUATION: evaluation_schema(), STUDY: study_schema(list(training["properties"]))}
    return {name: json.dumps(entry, ensure_ascii=False, indent=1) + "\n" for name, entry in schemas.items()}


def training_schema() -> Schema:
    """Return the schema of a training file: every key of the argument classes that the host's parser takes."""
    import torch  # noqa: F401 - the plug-in comes with it, and with the plug-in our keys
    from llamafactory.hparams import parser

    classes = parser._TRAIN_ARGS
    properties = {name: entry for cls in classes for name, entry in _properties(cls)}
    description, default = (properties["kd_loss"][key] for key in ("description", "default"))
    properties["kd_loss"] = {
        "anyOf": [{"enum": list(PRESETS)}, _formula_schema()],
        "default": default,
        "description": description,
    }
    return _closed("A training run of LLaMA-Factory", properties)


def _formula_schema() -> Schema:
    number: Schema = {"anyOf": [{"type": "number"}, _object({"from": {"type": "number"}, "to": {"type": "number"}})]}
    threshold: Schema = {"anyOf": [{"const": "mean"}, *number["anyOf"]]}
    names: Schema = {"anyOf": [{"enum": list(DIVERGENCES)}, {"type": "string", "pattern": ":"}]}
    side = {
        "divergence": {"anyOf": [*names["anyOf"], {"type": "object", "additionalProperties": number}]},
        **dict.fromkeys(("skew", "weight", "lambda", "temperature", "interpolation", *PARAMETERS), number),
    }
    gate = {
        "signal": {"enum": list(SIGNALS)},
        **dict.fromkeys(("above", "below"), threshold),
        **dict.fromkeys(("share", "width", "cooling"), number),
    }
    sides = {key: _object(side) for key in ("easy", "hard")}
    complete = {PRESET_KEY: {"enum": list(PRESETS)}, "target": {"enum": list(TARGETS)}, "gate": _object(gate), **sides}
    return _object({**complete, **side})


def evaluation_schema() -> Schema:
    """Return the schema of an evaluation file."""
    from llamafactory.hparams import ModelArguments

    defaults = {field.name: field.default for cls in (Settings, Decoding) for field in fields(cls)}
    examples = {"from": _TEXT, "number": _COUNT, "choose": {"enum": ["nearest", "first"]}}
    prompt: Schema = {
        "prompt": {**_TEXT, "description": "parrot, plain, or a text with {source} and other fields."},
        "system_prompt": {**_TEXT, "description": "In place of the template's own."},
        "examples": {**_object(examples), "description": "Translations to show before the sentence."},
        "document": {
            **_one_of([{"type": "boolean"}, {"type": "integer", "minimum": 2}]),
            "description": "The sentences of a document together, or so many of them at most.",
        },
        "enable_thinking": {"type": "boolean", "description": "Of templates with thoughts."},
    }
    properties: Schema = {
        "task": {
            **_TEXT,
            "description": "wmt22, wmt21_valid, a test set of sacrebleu, a folder of your own, or lm_eval:TASK,TASK.",
        },
        "task_dir": {**_TEXT, "description": "Folder of the test sets."},
        "directions": {**_TEXTS, "description": "Such as [en-de, de-en]."},
        "systems": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": _system({**dict(_properties(ModelArguments)), **prompt}),
            "description": "Name -> a model, or translations that are only scored.",
        },
        "template": {**_TEXT, "description": "A template of LLaMA-Factory; a system may name its own."},
        "baseline": {**_TEXT, "description": "The system that differences and significance are against."},
        "teacher": {**_TEXT, "description": "The system whose translations similarity is measured to."},
        "metrics": {
            **_TEXTS,
            "items": {"enum": [*METRICS, *(f"{metric}?" for metric in OPTIONAL)]},
            "description": "`comet?` is COMET where it can run, and a note where not.",
        },
        "comet": {**_one_of([_TEXT, _TEXTS]), "description": "COMET models of any kind: names on the Hub or paths."},
        "comet_model": {**_TEXT, "description": "The only COMET model: a name on the Hub, a checkpoint, or a folder."},
        "metricx": {**_one_of([_TEXT, _TEXTS]), "description": "MetricX models: names on the Hub or folders."},
        "bleu_tokenizer": {
            "anyOf": [{"enum": list(TOKENIZERS)}, _object_of({"enum": list(TOKENIZERS)})],
            "description": "BLEU's tokenizer, or target language -> tokenizer.",
        },
        "significance": {"enum": list(TESTS), "description": "Paired bootstrap or approximate randomization."},
        "language_names": {**_object_of(_TEXT), "description": "Code -> the language's name in the prompt."},
        **prompt,
        "num_beams": {**_COUNT, "description": "1 is greedy."},
        "max_new_tokens": _COUNT,
        "length_penalty": {"type": "number", "description": "For beam search."},
        "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
        "backend": {"enum": list(BACKENDS)},
        "batch_tokens": {**_COUNT, "description": "Tokens of prompt and output decoded at a time, over all beams."},
        "batch_size": {**_COUNT, "description": "A limit in sentences in addition to `batch_tokens`."},
        "seed": {"type": "integer", "minimum": 0},
        "num_fewshot": {
            "type": "integer",
            "minimum": 0,
            "description": "Of `lm_eval:…`: examples shown first.",
        },
        "apply_chat_template": {"type": "boolean", "description": "Of `lm_eval:…`: ask by the tokenizer's template."},
        "save_dir": {**_TEXT, "description": "Where everything goes."},
    }
    complete = {name: {**_or_null(entry), **_default(defaults.get(name))} for name, entry in properties.items()}
    return _closed("An evaluation", complete, required=["task", "systems", "save_dir"])


def study_schema(training_keys: list[str]) -> Schema:
    """Return the schema of a study file, whose systems, overrides and matrix hold keys of a training file."""
    keys = {key: _or_null({"$ref": f"{TRAINING}#/properties/{key}"}) for key in training_keys}
    values = {key: {"type": "array", "minItems": 1, "items": entry} for key, entry in keys.items()}
    model: Schema = {"type": ["object", "null"], "required": ["model_name_or_path"]}
    cache = {"folder": _TEXT, "format": _TEXT, "k": _COUNT, "dtype": _TEXT, "batch_size": _COUNT}
    properties: Schema = {
        "base": {"anyOf": [_TEXT, _TEXTS], "description": "Other study files, whose keys come first."},
        "output_dir": {**_TEXT, "description": "Where everything goes."},
        "prepare": {"type": "array", "items": _TEXT, "description": "Commands that run once, before everything."},
        "train": {**_TEXT, "description": "The training YAML that every run starts from."},
        "evaluation": {**_TEXT, "description": "Test sets, metrics and decoding; without it, validation judges."},
        "teacher_cache": {"anyOf": [_TEXT, _object(cache)], "description": "One pass of the teacher for all runs."},
        "overrides": {"$ref": "#/definitions/keys"},
        "systems": {
            "type": "object",
            "additionalProperties": {"$ref": "#/definitions/keys"},
            "description": "Name -> keys in place of the training YAML's.",
        },
        "models": {"type": "object", "additionalProperties": model, "description": "Models that are only evaluated."},
        "matrix": {**_object(values), "description": "Training key -> values; every combination runs."},
        "seeds": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "uniqueItems": True},
        "baseline": {**_TEXT, "description": "The system that differences and significance are against."},
        "teacher": {**_TEXT, "description": "One of `models`: similarity is to its translations."},
        "select": {
            **_object({"key": _TEXT, "metric": _TEXT, "mode": {"enum": ["min", "max"]}, "evaluation": _TEXT}),
            "required": ["key"],
            "description": "Each system at its own best value of a key of the matrix, by a validation metric.",
        },
    }
    definitions = {"keys": {**_object({"train": _TEXT, **_WHOSE_TEXT, **keys}), "type": ["object", "null"]}}
    return {
        **_closed("A study", {name: _or_null(entry) for name, entry in properties.items()}),
        "definitions": definitions,
    }


def _closed(title: str, properties: Mapping[str, Schema], required: list[str] | None = None) -> Schema:
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": title}
    return {**head, **_object(properties), **({"required": required} if required else {})}


def _object(properties: Mapping[str, Schema]) -> Schema:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _object_of(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _system(model_keys: dict[str, Schema]) -> Schema:
    keys = {"hypotheses": {**_TEXT, "description": "Folder of <src>-<tgt>.txt files."}, "template": _TEXT}
    return {"type": "object", "properties": {**model_keys, **keys}}


def _properties(cls: type) -> Iterator[tuple[str, Schema]]:
    """Yield the name and the schema of each field of an argument class."""
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        if field.init:
            entry = _default(field.default)
            help_text = field.metadata.get("help")
            if help_text:
                entry["description"] = " ".join(str(help_text).replace("%%", "%").split())  # argparse's escape
            yield field.name, {**_of_type(hints[field.name]), **entry}


def _default(value: Any) -> Schema:
    return {"default": value} if isinstance(value, bool | int | float | str) else {}


def _of_type(hint: Any) -> Schema:
    """Return the schema of a type; a type that YAML has no word for may be anything."""
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return _one_of([_of_type(argument) for argument in arguments])
    if origin in (list, tuple):
        return {"type": "array", "items": _of_type(arguments[0]) if arguments else {}}
    if hint is dict or origin is dict:
        return {"type": "object"}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    return {}


def _one_of(schemas: list[Schema]) -> Schema:
    if {} in schemas:
        return {}
    if all(set(entry) == {"type"} for entry in schemas):
        return {"type": [entry["type"] for entry in schemas]}
    return {"anyOf": schemas}


def _or_null(entry: Schema) -> Schema:
    """Return a schema that takes null as well: a key that is null is as good as absent."""
    if "type" in entry:
        known = entry["type"] if isinstance(entry["type"], list) else [entry["type"]]
        return {**entry, "type": [*known, *(["null"] if "null" not in known else [])]}
    if "enum" in entry:
        return {**entry, "enum": [*entry["enum"], None]}
    if "anyOf" in entry:
        return {**entry, "anyOf": [*entry["anyOf"], {"type": "null"}]}
    return {"anyOf": [entry, {"type": "null"}]}
