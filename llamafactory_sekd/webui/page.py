"""What our sections need of the host's page, handed in by the host's room."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gradio.components import Component


Values = Mapping[str, Any]


@dataclass(frozen=True)
class Page:
    """The page around a section.

    Attributes:
        elements: the fields outside of the section that it reads, by the host's names (``top.model_path``).
        list_checkpoints: (model, finetuning type) to the checkpoints trained from it.
        student_arguments: (values of ``elements``, checkpoints or None for the model itself) to the host's model
            arguments.
        teacher_arguments: values of ``elements`` to the host's model arguments of the teacher, None without a teacher.
        refusal: language to the host's message where nothing may be started now (its own run, demo mode), else "".
        alert: (name of one of the host's messages, language) to its text.
    """

    elements: Mapping[str, Component]
    list_checkpoints: Callable[[str | None, str], list[str]]
    student_arguments: Callable[[Values, str | list[str] | None], dict[str, Any]]
    teacher_arguments: Callable[[Values], dict[str, Any] | None]
    refusal: Callable[[str], str]
    alert: Callable[[str, str], str]

    def values(self, data: Mapping[Component, Any]) -> dict[str, Any]:
        """The values of ``elements`` by name, from what Gradio hands to an event."""
        return {name: data[element] for name, element in self.elements.items()}
