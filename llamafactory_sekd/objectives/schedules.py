"""How a coefficient moves over the training steps."""

from __future__ import annotations


def linear(start: float, end: float | None, step: int, total_steps: int) -> float:
    """Return a value that moves linearly over the steps: ``start`` at the first (step 0), ``end`` at the last.

    Args:
        start: value at step 0.
        end: value at step ``total_steps - 1`` and later; None keeps ``start`` (paper, Figure 3, for β).
        step: the step, from 0.
        total_steps: number of steps.
    """
    if end is None:
        return start

    return start + (end - start) * min(step / max(total_steps - 1, 1), 1.0)
