"""The frozen teacher inside the training process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..heads import (
    hands_out_what_the_head_returns,
    is_plain_product,
    replaced_forward,
    selected_rows,
    whole_parameters,
)
from ..objectives import LogitsSource
from .source import Answers, product


class Teacher:
    """A frozen causal language model that hands out response rows: its logits, or its hidden states and its head.

    Args:
        model: the model, loaded and not yet placed.
        accelerator: the trainer's accelerator; the teacher is sharded and placed where it puts models.
    """

    collated_keys: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, accelerator: Any) -> None:
        model.requires_grad_(False)
        self.head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self.model: nn.Module = _place(model, accelerator)
        self.model.eval()

    def can_hand_out_hidden_states(self, inputs: dict[str, Any]) -> bool:
        """Whether logits are exactly head times hidden states, and the head can be read outside of a forward pass."""
        return (
            is_plain_product(self.head)
            and not _is_flat(self.model)
            and hands_out_what_the_head_returns(self.model, self.head, inputs)
        )

    @torch.no_grad()
    def logits(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Teacher logits ``[tokens, vocab]`` at the response positions.

        Args:
            inputs: the batch as the student sees it (ids, attention mask, position ids), without labels.
            rows: ``[batch, length]`` bool, from :func:`llamafactory_sekd.heads.response_positions`.
        """
        with selected_rows(self.head, rows):
            return self.model(**inputs, use_cache=False).logits[0]

    @torch.no_grad()
    def hidden_states(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Teacher hidden states ``[tokens, width]`` at the response positions, as its head would read them."""
        caught: list[torch.Tensor] = []

        def catch(hidden: torch.Tensor) -> torch.Tensor:
            caught.append(hidden[rows.to(hidden.device)])
            return hidden.new_zeros(1, 1, 1)

        with replaced_forward(self.head, catch):
            self.model(**inputs, use_cache=False)

        return caught[0]

    def can_answer_in_chunks(self, inputs: dict[str, Any]) -> bool:
        """Where its logits are a product that can be formed anywhere."""
        return self.can_hand_out_hidden_states(inputs)

    def answers(self, inputs: dict[str, Any], rows: torch.Tensor) -> Answers:
        """One forward pass; see :class:`TeacherSource`."""
        hidden = self.hidden_states(inputs, rows)

        @contextmanager
        def opened(vocab_size: int | None) -> Iterator[LogitsSource]:
            with self.head_parameters() as (weight, bias):
                yield product(hidden, weight, bias, vocab_size)

        return opened

    @contextmanager
    def head_parameters(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight ``[vocab, width]`` and bias ``[vocab]`` (or None) of the head, whole, for the duration."""
        with whole_parameters(self.head) as parameters:
            yield parameters


def _is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))


def _is_flat(model: nn.Module) -> bool:
    """FSDP1 keeps parameters in one flat tensor, which is whole only inside of a forward pass."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(model, FullyShardedDataParallel)


def _place(model: nn.Module, accelerator: Any) -> nn.Module:
    """Place and shard a frozen model the way the student is."""
    if _is_quantized(model):  # bitsandbytes has put it on its device already
        return model

    state = accelerator.state
    if getattr(state, "deepspeed_plugin", None) is not None:
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(model, accelerator)

    if getattr(state, "fsdp_plugin", None) is not None:
        if getattr(accelerator, "is_fsdp2", False):
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            return fsdp2_prepare_model(accelerator, model)

        from trl.models.utils import prepare_fsdp

        return prepare_fsdp(model, accelerator)

    return accelerator.prepare_model(model, evaluation_mode=True)
