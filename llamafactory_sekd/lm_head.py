"""The language-model head: restrict it to response tokens, or let it return something else than logits.

A causal language model computes hidden states ``[batch, length, width]`` and hands them to its head, a linear layer.
Only the response tokens are needed, so nothing of ``[batch, length, vocab]`` has to exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


IGNORE_INDEX = -100
# Far from what a model could leave unchanged by accident: soft-capping at 50 turns it into 50, a scale multiplies it.
_PROBE = 1000.0


def response_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the positions whose next token belongs to a response.

    Args:
        labels: ``[batch, length]`` int64, -100 outside of responses, not shifted (the host's collator).

    Returns:
        ``rows``, ``[batch, length]`` bool: the positions that predict a response token; and ``targets``, ``[tokens]``
        int64: the tokens that they predict, in the order in which ``hidden[rows]`` lists them.
    """
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    rows = shifted != IGNORE_INDEX
    return rows, shifted[rows]


@contextmanager
def selected_rows(head: nn.Module, rows: torch.Tensor) -> Iterator[None]:
    """For the duration, the head reads only ``hidden[rows]`` and so returns ``[1, tokens, vocab]``."""

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][rows.to(args[0].device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_forward(head: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """For the duration, ``head(hidden)`` returns ``forward(hidden)``; the module's own hooks run around it.

    These hooks are what gathers, shards and reduces the weight under DDP, ZeRO and FSDP. So whatever reads the weight
    inside of ``forward`` reads it whole, and its gradient goes the usual way.
    """
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def is_plain_product(head: nn.Module) -> bool:
    """Whether the head computes ``hidden @ weight.T + bias`` and nothing else (no adapter, no quantization)."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in head.__dict__


@torch.no_grad()
def hands_out_what_the_head_returns(model: nn.Module, head: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether ``model(**inputs).logits`` is what the head returned, unchanged.

    It is not where the model scales or caps its logits (Gemma 2, Cohere, Granite). One forward pass with a head that
    returns a constant answers it for every architecture, without a list of their configuration keys.

    Args:
        model: the model, wrapped as for training (all ranks call this together).
        head: its head.
        inputs: a batch as the model takes it, without labels.
    """

    def constant(hidden: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 1, 1), _PROBE, dtype=torch.float32, device=hidden.device)

    # A resumed run probes where an uninterrupted one does not, so the pass must leave no trace in dropout's generator.
    device = inputs["input_ids"].device
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type), replaced_forward(head, constant):
        logits = model(**inputs).logits

    return logits is not None and logits.numel() == 1 and logits.item() == _PROBE


@contextmanager
def whole_parameters(head: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield the head's weight and bias, gathered where ZeRO-3 or FSDP2 shards them; for reading only."""
    weight, bias = head.weight, head.bias
    if hasattr(weight, "ds_id"):
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        # What is whole already is so for the head's own forward pass, and gathering it would shard it at the end.
        parameters = [parameter for parameter in (weight, bias) if parameter is not None]
        sharded = [parameter for parameter in parameters if parameter.ds_status != ZeroParamStatus.AVAILABLE]
        with deepspeed.zero.GatheredParameters(sharded):
            yield weight, bias
    elif hasattr(weight, "full_tensor"):
        yield weight.full_tensor(), None if bias is None else bias.full_tensor()
    else:
        yield weight, bias
