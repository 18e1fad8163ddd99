"""Matrix products with a head: the type that they are done in, and for how many tokens at a time.

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


# On a CPU the products run at full speed from a few dozen tokens, and smaller logits stay in its caches.
LOGITS_BUDGET = 256 * 2**20
# On an accelerator each chunk reads both heads and adds to the head's gradient, whatever its size: at 256 tokens of
# 128,256 entries that takes as long as the products themselves, at 4,096 a tenth (docs/performance.md).
ACCELERATOR_BUDGET = 2 * 2**30
MOST_TOKENS = 4096
# The optimizer's states, on their way in the first step, need what is free more than the logits do.
_SHARE_OF_FREE_MEMORY = 8


def default_chunk_size(
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | None = None,
    budget_bytes: int | None = None,
) -> int:
    """Return the number of tokens whose logits, student's and teacher's, fit the budget.

    Args:
        vocab_size: the number of vocabulary entries.
        dtype: the type of the logits, which is that of the products (see `fused_linear_distillation`).
        device: where the products are done; None for a CPU.
        budget_bytes: memory for both logits of one chunk. Default: `LOGITS_BUDGET` on a CPU; on an accelerator an
            eighth of the free memory, between that and `ACCELERATOR_BUDGET`.

    Returns:
        A multiple of 64 where the budget allows 64 tokens, at least 1 otherwise; at most `MOST_TOKENS` on an
        accelerator, since larger chunks gain nothing there.
    """
    on_accelerator = device is not None and device.type != "cpu"
    if budget_bytes is None:
        budget_bytes = _accelerator_budget(device) if on_accelerator else LOGITS_BUDGET  # type: ignore[arg-type]
    tokens = budget_bytes // (2 * vocab_size * dtype.itemsize)
    if on_accelerator:
        tokens = min(tokens, MOST_TOKENS)
    return tokens // 64 * 64 if tokens >= 64 else max(tokens, 1)


def _accelerator_budget(device: torch.device) -> int:
    free = free_memory(device)
    wanted = ACCELERATOR_BUDGET if free is None else free // _SHARE_OF_FREE_MEMORY
    return min(max(wanted, LOGITS_BUDGET), ACCELERATOR_BUDGET)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes of an accelerator that a new tensor can have; None where that cannot be asked."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
