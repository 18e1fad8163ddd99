"""What our sections need of the host's page, handed in by the host's room."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradio.components import Component


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
