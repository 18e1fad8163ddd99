"""What an optimizer keeps."""

from __future__ import annotations


# The host's `optim`, by how it begins -> bytes per trainable parameter. The first that fits counts.
STATE_BYTES: tuple[tuple[str, float], ...] = (
    ("adamw_bnb_8bit", 2),
    ("adamw_8bit", 2),
    ("paged_adamw_8bit", 2),
    ("paged_adamw", 8),
    ("adamw_torch_8bit", 2),
    ("adamw_torch_4bit", 1),
    ("adamw", 8),
    ("adafactor", 0),  # a row and a column per matrix
    ("lion_8bit", 1),
    ("paged_lion_8bit", 1),
    ("lion", 4),
    ("paged_lion", 4),
    ("sgd", 0),
    ("rmsprop", 4),
    ("adagrad", 4),
)


def state_bytes(optimizer: str) -> float | None:
    """Bytes that an optimizer keeps per trainable parameter; None where that is not known."""
    return next((size for prefix, size in STATE_BYTES if optimizer.startswith(prefix)), None)


def copies_nothing(optimizer: str) -> bool:
    """Whether it updates parameters without copies of them."""
    return optimizer.endswith("_fused") or "bit" in optimizer or "bnb" in optimizer
