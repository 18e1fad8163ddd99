"""The frozen teacher inside the training process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from llamafactory_sekd.lm_head import (
    hidden_states_of,
    is_plain_product,
    logit_transform,
    rows_of,
    selected_rows,
    whole_parameters,
)
from llamafactory_sekd.objectives import IDENTITY, LogitsSource, LogitTransform
from llamafactory_sekd.teacher.placement import Placement, is_flat, is_sharded, place
from llamafactory_sekd.teacher.source import Answers, product


class Teacher:
    """A frozen causal language model that returns response rows: its logits, or its hidden states and its head.

    Args:
        model: the model, loaded and not yet placed.
        accelerator: the trainer's accelerator; the teacher is sharded and placed where it puts models.
        placement: its placement otherwise.
    """

    collated_keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, accelerator: Any, placement: Placement | None = None) -> None:
        placement = placement or Placement()
        model.requires_grad_(False)
        self.head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self.transform: LogitTransform | None = None
        self.device = placement.device
        self.model: nn.Module = place(model, self.head, accelerator, placement)
        self.model.eval()
        self.is_sharded = is_sharded(self.model)

    def announce(self, batches: Sequence[dict[str, Any]]) -> None:
        """Do nothing: a model that computes when it is asked."""

    def logit_transform(self, inputs: dict[str, Any]) -> LogitTransform | None:
        """Return what makes its logits of head times hidden states; None where nothing does that can be kept.

        None as well where the head cannot be read outside of a forward pass.
        """
        if not is_plain_product(self.head) or is_flat(self.model):
            return None
        with self._speaking():
            return logit_transform(self.model, self.head, self._there(inputs))

    @torch.no_grad()
    def logits(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Teacher logits ``[tokens, vocab]`` at the response positions.

        Args:
            inputs: the batch as the student sees it (ids, attention mask, position ids), without labels.
            rows: ``[batch, length]`` bool, from :func:`llamafactory_sekd.objectives.response_positions`.
        """
        with self._speaking(), selected_rows(self.head, rows_of(rows)):
            return self.model(**self._there(inputs), use_cache=False).logits[0].to(rows.device)

    @torch.no_grad()
    def hidden_states(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Teacher hidden states ``[tokens, width]`` at the response positions, as its head would read them."""
        with self._speaking():
            found = hidden_states_of(
                self.head, lambda: self.model(**self._there(inputs), use_cache=False), rows_of(rows)
            )
        return found.to(rows.device)

    def can_answer_in_chunks(self, inputs: dict[str, Any]) -> bool:
        """Where its logits are a product that can be formed anywhere, scaled or capped."""
        self.transform = self.logit_transform(inputs)
        return self.transform is not None

    def answers(self, inputs: dict[str, Any], rows: torch.Tensor) -> Answers:
        """One forward pass; see :class:`TeacherSource`."""
        hidden = self.hidden_states(inputs, rows)

        @contextmanager
        def opened(vocab_size: int | None) -> Iterator[LogitsSource]:
            with self.head_parameters() as (weight, bias):
                bias = None if bias is None else bias.to(hidden.device)
                yield product(hidden, weight.to(hidden.device), bias, vocab_size, self.transform or IDENTITY)

        return opened

    def who_answers(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Return no column: this is one teacher."""
        return rows.new_empty(int(rows.sum()), 0)

    @contextmanager
    def head_parameters(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight ``[vocab, width]`` and bias ``[vocab]`` (or None) of the head, complete, for the duration."""
        with whole_parameters(self.head) as parameters:
            yield parameters

    def _speaking(self) -> AbstractContextManager[None]:
        """Hold what has to hold while the model computes."""
        return nullcontext()

    def _there(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch on the teacher's device."""
        return inputs if self.device is None else send_to_device(inputs, self.device)
