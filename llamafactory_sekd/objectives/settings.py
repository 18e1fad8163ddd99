"""What selects and shapes an objective: the `kd_*` keys that reach the mathematics."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llamafactory_sekd.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Settings:
    """The `kd_*` keys under their YAML names. Their ranges are checked where the YAML is read."""

    kd_loss: str = "self_evolution"
    kd_lambda: float = 0.5
    kd_beta: float = 0.5
    kd_gamma: float | torch.Tensor = 0.4
    kd_topk: float | None = None
    kd_temperature: float = 1.0
    kd_hard_scale: float | torch.Tensor | None = None


def check_tokens(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, names: tuple[str, str]) -> None:
    """Both tensors are `[tokens, …]`, the labels `[tokens]`; anything else is an `ArgumentError`."""
    for name, tensor in zip(names, (student, teacher), strict=True):
        if tensor.dim() != 2:
            raise ArgumentError(
                f"{name} has shape {list(tensor.shape)}: two dimensions are needed, the first runs over the response "
                "tokens; flatten batch and length and keep the response positions only."
            )
    if labels.dim() != 1 or len(student) != len(labels) or len(teacher) != len(labels):
        raise ArgumentError(
            f"{names[0]} {list(student.shape)}, {names[1]} {list(teacher.shape)} and labels {list(labels.shape)} "
            "disagree about the number of tokens: pass one row and one label for every response token."
        )


def check_same_vocabulary(student_entries: int, teacher_entries: int, remedy: str) -> None:
    """Refuse a distribution over another vocabulary, which cannot be a target, with the remedy."""
    if student_entries != teacher_entries:
        raise ArgumentError(
            f"the student has {student_entries} vocabulary entries, the teacher {teacher_entries}: {remedy}"
        )
