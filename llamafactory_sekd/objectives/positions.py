"""Which positions of a sequence predict a response token, from labels as Hugging Face's collators make them."""

from __future__ import annotations

import torch
from torch.nn.functional import pad


IGNORE_INDEX = -100


def response_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the positions whose next token belongs to a response.

    Args:
        labels: ``[batch, length]`` int64, -100 outside of responses, not shifted (the host's collator).

    Returns:
        ``rows``, ``[batch, length]`` bool: the positions that predict a response token; and ``targets``, ``[tokens]``
        int64: the tokens that they predict, in the order in which ``hidden[rows]`` lists them.
    """
    shifted = pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    rows = shifted != IGNORE_INDEX
    return rows, shifted[rows]
