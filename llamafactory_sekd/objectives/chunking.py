"""How many tokens the fused objective takes at a time."""

from __future__ import annotations

import torch


# Large enough for the matrix products to run at full speed, small beside the head's gradient of a large model.
LOGITS_BUDGET = 256 * 2**20


def default_chunk_size(
    vocab_size: int, dtype: torch.dtype = torch.float32, *, budget_bytes: int = LOGITS_BUDGET
) -> int:
    """Return the number of tokens whose logits, student's and teacher's, fit the budget.

    Args:
        vocab_size: the number of vocabulary entries.
        dtype: the type of the logits, which is that of the products (see `fused_linear_distillation`).
        budget_bytes: memory for both logits of one chunk.

    Returns:
        A multiple of 64 where the budget allows 64 tokens, at least 1 otherwise.
    """
    tokens = budget_bytes // (2 * vocab_size * dtype.itemsize)
    return tokens // 64 * 64 if tokens >= 64 else max(tokens, 1)
