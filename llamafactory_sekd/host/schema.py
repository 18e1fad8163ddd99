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
from pydantic.json_schema import GenerateJsonSchema

from llamafactory_sekd.evaluation.evaluation_settings import Asking, EvaluationKeys, Scored
from llamafactory_sekd.evaluation.harness import HarnessKeys
from llamafactory_sekd.files import write_atomic
from llamafactory_sekd.formula import DIVERGENCES, PARAMETERS, SIGNALS, TARGETS
from llamafactory_sekd.keys import Keys
from llamafactory_sekd.presets import PRESET_KEY, PRESETS
from llamafactory_sekd.study.spec import BASE, StudyKeys


app = typer.Typer(help="Write JSON schemas of the YAML files, for editors.", add_completion=False)
Schema = dict[str, Any]
TRAINING, EVALUATION, STUDY = "training.json", "evaluation.json", "study.json"
_PLAIN: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_TEXT: Schema = {"type": "string"}
_TEXTS: Schema = {"type": "array", "items": _TEXT, "minItems": 1, "uniqueItems": True}


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

    properties = _keys(EvaluationKeys)
    own = {name: properties[name] for name in ("template", *Asking.names())}
    properties["systems"]["additionalProperties"] = {
        "type": "object",
        "properties": {**dict(_properties(ModelArguments)), **_keys(Scored), **own},
    }
    # An evaluation by the harness names no directions.
    return _closed("An evaluation", {**properties, **_keys(HarnessKeys)}, required=["task", "systems", "save_dir"])


def study_schema(training_keys: list[str]) -> Schema:
    """Return the schema of a study file, whose systems, overrides and matrix hold keys of a training file."""
    keys = {key: _or_null({"$ref": f"{TRAINING}#/properties/{key}"}) for key in training_keys}
    cell: Schema = {"$ref": "#/definitions/keys"}
    base = {"anyOf": [_TEXT, _TEXTS], "description": "Other study files, whose keys come first."}
    properties = {BASE: _or_null(base), **_keys(StudyKeys), "overrides": _or_null(cell)}
    cache = properties["teacher_cache"]
    properties["teacher_cache"] = {"anyOf": [_TEXT, cache], "description": cache.pop("description")}
    properties["systems"]["additionalProperties"] = cell
    properties["models"]["additionalProperties"] = {"type": ["object", "null"], "required": ["model_name_or_path"]}
    properties["matrix"] |= _object({key: {"type": "array", "minItems": 1, "items": keys[key]} for key in keys})
    properties["matrix"]["type"] = ["object", "null"]
    properties["select"]["required"] = ["key"]
    return {
        **_closed("A study", properties),
        "definitions": {"keys": _or_null(_object({"train": _TEXT, **_WHOSE_TEXT, **keys}))},
    }


class _Readable(GenerateJsonSchema):
    """Pydantic's schema without titles, and without null, which :func:`_or_null` adds to every key."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def nullable_schema(self, schema: Any) -> Schema:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> Schema:
        entry = super().default_schema(schema)
        return {**{key: entry[key] for key in entry if key != "default"}, **_default(entry.get("default"))}


def _keys(kind: type[Keys]) -> dict[str, Schema]:
    """Return the schema of each key of a file."""
    found = kind.model_json_schema(schema_generator=_Readable)
    nested = {f"#/$defs/{name}": _object(entry["properties"]) for name, entry in found.get("$defs", {}).items()}
    return {
        name: _or_null(nested.get(entry.pop("$ref", ""), {}) | entry) for name, entry in found["properties"].items()
    }


def _closed(title: str, properties: Mapping[str, Schema], required: list[str] | None = None) -> Schema:
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": title}
    return {**head, **_object(properties), **({"required": required} if required else {})}


def _object(properties: Mapping[str, Schema]) -> Schema:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


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
    if "enum" in entry:
        entry = {**entry, "enum": [*entry["enum"], *([None] if None not in entry["enum"] else [])]}
    if "type" in entry:
        known = entry["type"] if isinstance(entry["type"], list) else [entry["type"]]
        return {**entry, "type": [*known, *(["null"] if "null" not in known else [])]}
    if "enum" in entry:
        return entry
    if "anyOf" in entry:
        return {**entry, "anyOf": [*entry["anyOf"], {"type": "null"}]}
    return {"anyOf": [entry, {"type": "null"}]}
