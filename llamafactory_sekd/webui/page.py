"""What our parts of the page share: the host's page around them, their texts, the keys that fields stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import yaml

from llamafactory_sekd.argument_checks import check_distillation_arguments
from llamafactory_sekd.arguments import AUTO, KEYS, DistillationArguments, keys_read_by
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.presets import PRESETS


if TYPE_CHECKING:
    from gradio.components import Component


LANGUAGES: tuple[str, ...] = ("en", "ru", "zh", "ko", "ja")
_OBJECTIVE = "kd_loss"
NO_QUANTIZATION = "none"
COMPILE = {AUTO: None, "true": True, "false": False}
_ON_POLICY = ("kd_on_policy", "kd_on_policy_truncated", "kd_on_policy_every")
_MAPPINGS = ("kd_loss", "teacher_model")  # a name, or a mapping on one line

Values = Mapping[str, Any]  # of fields, by name
Data = Mapping[Any, Any]  # of components, as Gradio hands them to an event
DIRECTIONS = ("en-de", "de-en", "en-cs", "cs-en")


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in this process.

    Attributes:
        name: its path, with the adapters' where it has any.
        tokenizer: its tokenizer.
        model: the model, in eval mode, on its device.
        encode: (the user's message, the response) to the ids of the prompt and of the response with its end token, as
            in training.
        stop_ids: the tokens that end a response.
    """

    name: str
    tokenizer: Any
    model: Any
    encode: Callable[[str, str], tuple[list[int], list[int]]]
    stop_ids: Sequence[int]


@dataclass(frozen=True)
class Page:
    """The page around a section.

    Attributes:
        elements: the fields outside of the section that it reads, by the host's names (``top.model_path``).
        list_checkpoints: (model, finetuning type) to the checkpoints trained from it.
        student_arguments: (values of ``elements``, checkpoints or None for the model itself) to the host's model
            arguments.
        teacher_arguments: values of ``elements`` to the host's model arguments of the teacher, None without a teacher.
        is_demo: whether the page is a public demo, in which nothing may be started.
        is_busy: whether the host's own training or evaluation runs.
        load: (model arguments, template) to the loaded model.
        alert: (name of one of the host's messages, language) to its text.
    """

    elements: Mapping[str, Component]
    list_checkpoints: Callable[[str | None, str], list[str]]
    student_arguments: Callable[[Values, str | list[str] | None], dict[str, Any]]
    teacher_arguments: Callable[[Values], dict[str, Any] | None]
    is_demo: bool
    is_busy: Callable[[], bool]
    load: Callable[[dict[str, Any], str], LoadedModel]
    alert: Callable[[str, str], str]

    def values(self, data: Data) -> dict[str, Any]:
        """Return the values of ``elements`` by name."""
        return {name: data[element] for name, element in self.elements.items()}


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


def unused_keys(kd_loss: Any) -> frozenset[str]:
    """Return the keys that have no effect with this objective, a name or a mapping, also as text.

    Where it cannot be read no key counts as unused; the checks then say what is wrong.
    """
    try:
        return frozenset(KEYS) - keys_read_by(DistillationArguments(kd_loss=kd_loss).kd_loss)
    except ArgumentError:
        return frozenset()


def distillation_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the YAML: those that the objective uses and that were filled in.

    Args:
        values: what each field of the panel holds, by key; several teacher adapters are a list.
    """
    unused = unused_keys(values["kd_loss"])
    keys = {key: _plain(key, value) for key, value in values.items() if key not in unused}
    if not keys.get("kd_on_policy"):  # references alone, as without these keys
        keys = {key: value for key, value in keys.items() if key not in _ON_POLICY}
    return {key: value for key, value in keys.items() if value not in (None, "")}


def _plain(key: str, value: Any) -> Any:
    if key == "teacher_model_quantization_bit":
        return None if value == NO_QUANTIZATION else int(value)
    if key == "kd_compile":
        return COMPILE[value]
    if key in _MAPPINGS:
        return _mapping(key, value)
    if isinstance(value, list):
        return ",".join(value)
    if not isinstance(value, str):
        return value
    text = value.strip()
    # Not the field's own `type`: the host's parser resolves that in place, once it has run in this process.
    hint = get_type_hints(DistillationArguments)[key]
    kind = next((kind for kind in (int, float) if kind in (get_args(hint) or (hint,))), str)
    try:
        return kind(text) if text else None
    except ValueError:
        return text  # the checks refuse it, in words that name the key


def _mapping(key: str, value: Any) -> Any:
    value = value.strip() or None if isinstance(value, str) else value
    try:
        return getattr(DistillationArguments(**{key: value}), key)
    except ArgumentError:
        return value  # the checks refuse it, in words that name the key


def check_keys(keys: Mapping[str, Any]) -> None:
    """Check the distillation keys among the keys of a run; :class:`ArgumentError` for the first that cannot work."""
    known = {item.name for item in fields(DistillationArguments)}
    try:
        args = DistillationArguments(**{key: value for key, value in keys.items() if key in known})
    except TypeError as error:
        raise ArgumentError(str(error)) from error

    check_distillation_arguments(args)
