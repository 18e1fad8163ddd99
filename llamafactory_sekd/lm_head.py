"""The language-model head: restrict it to response tokens, or let it return something else than logits.

A causal language model computes hidden states ``[batch, length, width]`` and hands them to its head, a linear layer.
Only the response tokens are needed, so nothing of ``[batch, length, vocab]`` has to exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llamafactory_sekd.objectives import LogitTransform


# From hidden states ``[batch, length, width]`` to those of the response tokens, ``[tokens, width]``.
Select = Callable[[torch.Tensor], torch.Tensor]
# Both signs, and sizes at which a cap does little, something, and everything.
_PROBES = (-40.0, -3.0, 0.0, 1.0, 7.0, 100.0, 1.0e9)


def rows_of(rows: torch.Tensor) -> Select:
    """Return the function that takes ``hidden[rows]``, wherever the hidden states are."""

    def selected(hidden: torch.Tensor) -> torch.Tensor:
        return hidden[rows.to(hidden.device)]

    return selected


@contextmanager
def selected_rows(head: nn.Module, select: Select) -> Iterator[None]:
    """For the duration, the head reads only what ``select`` takes, and so returns ``[1, tokens, vocab]``."""

    def reduced(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (select(args[0]).unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(reduced)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_forward(head: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """For the duration, ``head(hidden)`` returns ``forward(hidden)``; the module's own hooks run around it.

    These hooks are what gathers, shards and reduces the weight under DDP, ZeRO and FSDP. So whatever reads the weight
    inside of ``forward`` reads all of it, and its gradient goes the usual way.
    """
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def hidden_states_of(head: nn.Module, forward: Callable[[], Any], select: Select) -> torch.Tensor:
    """Return what ``select`` takes of the hidden states that ``head`` is called with in a forward pass."""
    caught: list[torch.Tensor] = []

    def catch(hidden: torch.Tensor) -> torch.Tensor:
        caught.append(select(hidden))
        return hidden.new_zeros(1, 1, 1)

    with replaced_forward(head, catch):
        forward()
    return caught[0]


def is_plain_product(head: nn.Module) -> bool:
    """Whether the head computes ``hidden @ weight.T + bias`` and nothing else (no adapter, no quantization)."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in head.__dict__


@torch.no_grad()
def logit_transform(model: nn.Module, head: nn.Module, inputs: dict[str, Any]) -> LogitTransform | None:
    """Find what the model does to the products of its head (Cohere and Granite scale them, Gemma 2 caps them).

    One forward pass with a head that returns known values answers it for every architecture, without a list of their
    configuration keys.

    Args:
        model: the model, wrapped as for training (all ranks call this together).
        head: its head.
        inputs: a batch as the model takes it, without labels.

    Returns:
        The transform, equal to ``IDENTITY`` for most models; None where it is another function or looks at more than
        one logit.
    """

    def known(hidden: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[_PROBES]], dtype=torch.float32, device=hidden.device)

    # A resumed run probes where an uninterrupted one does not, so the pass must leave no trace in dropout's generator.
    device = inputs["input_ids"].device
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type), replaced_forward(head, known):
        logits = model(**inputs).logits

    if logits is None or logits.numel() != len(_PROBES):
        return None
    returned = logits.flatten().double().cpu()
    given = torch.tensor(_PROBES, dtype=torch.float64)
    one = _PROBES.index(1.0)
    scale, cap = returned[one].item(), returned[-1].item()
    if torch.allclose(returned, given * scale, rtol=1e-6, atol=0.0) and scale != 0.0:
        return LogitTransform(scale)
    # The last probe is far beyond any cap, so that what comes back is the cap; below it the scale can be had.
    if cap > 0.0 and 0.0 < scale < cap:
        scale = math.atanh(scale / cap) * cap
        scale = 1.0 if abs(scale - 1.0) < 1e-4 else scale
        if torch.allclose(returned, cap * torch.tanh(given * scale / cap), rtol=1e-5, atol=0.0):
            return LogitTransform(scale, cap)
    return None


@contextmanager
def whole_parameters(head: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield the head's weight and bias, gathered where ZeRO-3 or FSDP2 shards them; for reading only."""
    weight, bias = head.weight, head.bias
    if hasattr(weight, "ds_id"):
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        # What is gathered already is so for the head's own forward pass, and gathering it would shard it at the end.
        parameters = [parameter for parameter in (weight, bias) if parameter is not None]
        sharded = [parameter for parameter in parameters if parameter.ds_status != ZeroParamStatus.AVAILABLE]
        with deepspeed.zero.GatheredParameters(sharded):
            yield weight, bias
    elif hasattr(weight, "full_tensor"):
        yield weight.full_tensor(), None if bias is None else bias.full_tensor()
    else:
        yield weight, bias
