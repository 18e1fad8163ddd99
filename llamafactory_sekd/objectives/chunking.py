"""How many tokens the fused objective takes at a time, and what each size moves through memory."""

from __future__ import annotations

import math

import torch


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


def bytes_moved(
    tokens: int, chunk_size: int, vocab_size: int, widths: tuple[int, int], itemsize: int = 2, sum_itemsize: int = 4
) -> int:
    """Return the bytes that the objective reads from and writes to an accelerator's memory.

    Per chunk both heads are read for the logits, the student's again for the gradient of the hidden states, and the
    head's gradient is read and written. Per token both logits are written, read by the objective, overwritten with the
    gradient, and read by the two products of the backward pass.

    Args:
        tokens: response tokens of a micro-batch.
        chunk_size: tokens at a time.
        vocab_size: entries of both heads.
        widths: of the student's and the teacher's hidden states.
        itemsize: bytes of a number of heads and logits.
        sum_itemsize: bytes of a number in the sum of the head's gradient.
    """
    student, teacher = widths
    chunks = math.ceil(tokens / chunk_size)
    heads = vocab_size * itemsize * (2 * student + teacher)
    gradient = 2 * vocab_size * sum_itemsize * student
    logits = vocab_size * itemsize * (2 + 2 + 1 + 2)
    return chunks * (heads + gradient) + tokens * logits


def products_seconds(tokens: int, vocab_size: int, widths: tuple[int, int], flops: float = 728e12) -> float:
    """Return the time of the four products: both logits, and the gradients of hidden states and head.

    Args:
        tokens: response tokens of a micro-batch.
        vocab_size: entries of both heads.
        widths: of the student's and the teacher's hidden states.
        flops: operations per second; the default was measured by others on an H100 in bfloat16.
    """
    student, teacher = widths
    return 2 * tokens * vocab_size * (3 * student + teacher) / flops
