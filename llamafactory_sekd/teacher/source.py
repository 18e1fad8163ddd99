"""What the trainer asks of a teacher, wherever its answers come from."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class TeacherSource(Protocol):
    """A teacher that is computed now, or read from a cache.

    Attributes:
        collated_keys: entries of a batch that are the teacher's alone; the student must not see them.
    """

    collated_keys: tuple[str, ...]

    def can_hand_out_hidden_states(self, inputs: dict[str, Any]) -> bool:
        """Whether logits are exactly head times hidden states, and the head can be read outside of a forward pass."""

    def logits(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Teacher logits ``[tokens, vocab]`` at the response positions.

        Args:
            inputs: the batch as it was collated, without labels.
            rows: ``[batch, length]`` bool, from :func:`llamafactory_sekd.heads.response_positions`.
        """

    def hidden_states(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Teacher hidden states ``[tokens, width]`` at the response positions, as its head would read them."""

    def head_parameters(self) -> AbstractContextManager[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight ``[vocab, width]`` and bias ``[vocab]`` (or None) of the head, whole, for the duration."""
