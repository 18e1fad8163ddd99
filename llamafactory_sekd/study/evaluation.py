"""The evaluation that all models of a study share, and the eval.yaml of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.config import read_config
from llamafactory_sekd.data.testsets import TestSet
from llamafactory_sekd.errors import StudyError
from llamafactory_sekd.evaluation.evaluation_settings import Settings, parse_settings
from llamafactory_sekd.study.matrix import Cell


# The folders of a job's evaluations: on the test sets, and on the validation set that `select` chooses by.
TEST, VALIDATION = "eval", "validation"
# The name of the only system of each evaluation.
SYSTEM = "model"
_REPLACED = ("systems", "baseline", "teacher", "save_dir")
# Keys of a training that decide how its model is loaded.
_LOADING = ("trust_remote_code", "template")
_ADAPTERS = ("lora", "oft")


@dataclass(frozen=True)
class Evaluation:
    """What models are evaluated on: the keys that all of them share, and the test set of each direction."""

    config: Mapping[str, Any]
    test_sets: Mapping[str, TestSet]


# In place of a model where keys are looked at before there is one.
_NO_MODEL = {"model_name_or_path": "-"}


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return the keys of an evaluation's YAML that a study keeps; :class:`EvaluationError` where one cannot work."""
    config = {key: value for key, value in read_config(path, error=StudyError).items() if key not in _REPLACED}
    settings(config, _NO_MODEL, Path("-"))
    return config


def metric_models(config: Mapping[str, Any]) -> dict[str, str]:
    """Return name or path of each metric that is a model, such as ``{"comet": "Unbabel/wmt22-comet-da"}``."""
    return dict(settings(config, _NO_MODEL, Path("-")).models)


def settings(config: Mapping[str, Any], model: Mapping[str, Any], save_dir: Path) -> Settings:
    """Return the checked settings of one model's evaluation."""
    return parse_settings(eval_yaml(config, model, save_dir), "the study's `evaluation`")


def eval_yaml(config: Mapping[str, Any], model: Mapping[str, Any], save_dir: Path) -> dict[str, Any]:
    """Return the complete eval.yaml of one model."""
    return {**config, "systems": {SYSTEM: dict(model)}, "save_dir": str(save_dir)}


def model_of(cell: Cell) -> dict[str, Any]:
    """Return a trained cell's entry for the evaluation: the model, or its base with the adapters."""
    loading = {key: cell.config[key] for key in _LOADING if key in cell.config}
    if cell.config.get("finetuning_type", "lora") not in _ADAPTERS:
        return {"model_name_or_path": str(cell.model), **loading}
    base = cell.config.get("model_name_or_path")
    if base is None:
        raise StudyError(f"{cell.id}: `model_name_or_path` is missing in the training YAML.")
    return {"model_name_or_path": base, "adapter_name_or_path": str(cell.model), **loading}
