"""Matrix products with a head, and the type that they are done in.

Where that type is wider than the head's, or narrower than that of its gradient, a tile of the vocabulary is converted
at a time: no second head exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


# Entries of the vocabulary at a time, whose copies stay in a CPU's cache: 512 or 8,192 take a fifth more time.
TILE = 2048
# What torch calls the instructions for products of a type, on x86 and on ARM.
INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
_any_type_is_fast: ContextVar[bool] = ContextVar("_any_type_is_fast", default=False)


def product_type(weight: torch.Tensor) -> torch.dtype:
    """Return the type of a product with this weight: autocast's where that is on, otherwise the weight's.

    A CPU without instructions for that type would emulate them at a quarter of float32's speed or less: there it is
    float32.
    """
    device, dtype = weight.device.type, weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    is_slow = device == "cpu" and _is_emulated(dtype) and not _any_type_is_fast.get()
    return torch.float32 if is_slow else dtype


@contextmanager
def as_on_an_accelerator() -> Iterator[None]:
    """Let the CPU take the types that an accelerator would, to see how much memory they need there."""
    token = _any_type_is_fast.set(True)
    try:
        yield
    finally:
        _any_type_is_fast.reset(token)


def logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, out: torch.Tensor
) -> torch.Tensor:
    """`hidden · weightᵀ + bias`, written to `out` `[tokens, vocab]`, which is returned; the weight may be narrower."""
    for entries in _tiles(weight, out.dtype):
        tile = weight[entries].to(out.dtype).t()
        if bias is None:
            torch.mm(hidden, tile, out=out[:, entries])
        else:
            torch.addmm(bias[entries], hidden, tile, out=out[:, entries])
    return out


def hidden_gradient(gradient: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """`gradient · weight`, written to `out` `[tokens, width]`, which is returned; the weight may be narrower."""
    for entries in _tiles(weight, out.dtype):
        out.addmm_(gradient[:, entries], weight[entries].to(out.dtype), beta=float(entries.start > 0))
    return out


def add_weight_gradient(
    total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Add `scale · gradientᵀ · hidden` to `total`, `[vocab, width]` and of any type, and return it."""
    if total.dtype == gradient.dtype:
        return total.addmm_(gradient.t(), hidden, alpha=scale)
    for entries in _tiles(total, gradient.dtype):
        total[entries].add_(torch.mm(gradient[:, entries].t(), hidden), alpha=scale)
    return total


def _tiles(matrix: torch.Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """All rows at once where they have this type already."""
    step = max(len(matrix), 1) if matrix.dtype == dtype else TILE
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def _is_emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for products of a half-precision type; older torch cannot tell."""
    names = INSTRUCTIONS.get(dtype, ())
    if not names or not hasattr(torch.cpu, "get_capabilities"):
        return False
    return not any(torch.cpu.get_capabilities().get(name) for name in names)
