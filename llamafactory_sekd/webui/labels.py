"""The texts of the page in the host's five languages, one YAML file each."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.presets import PRESETS


LANGUAGES: tuple[str, ...] = ("en", "ru", "zh", "ko", "ja")
_OBJECTIVE = "kd_loss"


@cache
def _texts(language: str) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(
        files("llamafactory_sekd.webui").joinpath("languages", f"{language}.yaml").read_text(encoding="utf-8")
    )


@cache
def element_labels() -> dict[str, dict[str, dict[str, Any]]]:
    """Return ``{element: {language: properties}}``, as the host keeps its own; the properties are Gradio's."""
    labels: dict[str, dict[str, dict[str, Any]]] = {}
    helps = {item.name: item.metadata["help"] for item in fields(DistillationArguments)}
    for language in LANGUAGES:
        for name, properties in _texts(language)["elements"].items():
            properties = {"info": helps[name], **properties} if name in helps else dict(properties)
            if name == _OBJECTIVE:
                properties["choices"] = objective_choices(language)
            labels.setdefault(name, {})[language] = properties

    return labels


def objective_choices(language: str) -> list[tuple[str, str]]:
    """Return the objectives as a dropdown wants them: (name and one-line explanation, name).

    One that the language has no words for is shown with its formula.
    """
    words = _texts(language)["objectives"]
    return [(f"{name}: {words.get(name, preset.equation)}", name) for name, preset in PRESETS.items()]


def alert(name: str, language: str | None) -> str:
    """Return a message to the user in the language of the page."""
    return _texts(language if language in LANGUAGES else "en")["alerts"][name]


def words(language: str | None) -> dict[str, str]:
    """Return the words inside of views that we draw ourselves."""
    return _texts(language if language in LANGUAGES else "en")["words"]
