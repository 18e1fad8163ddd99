"""What the training tab draws besides the loss: validation NLL, hard share and difficulty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llamafactory_sekd.reporting.figures import draw_gate, draw_validation


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_distillation_axes(figure: Figure, trainer_log: Sequence[Mapping[str, Any]]) -> None:
    """Draw hard share and mean difficulty below the loss, the NLL of a validation over it.

    A log without these metrics leaves the figure as it is.

    Args:
        figure: the host's figure, with one pair of axes.
        trainer_log: the records of ``trainer_log.jsonl``.
    """
    records = [record for record in trainer_log if "kd/hard_ratio" in record]
    if not records:
        return

    grid = figure.add_gridspec(2, 1)
    loss = figure.axes[0]
    loss.set_subplotspec(grid[0])
    figure.set_size_inches(4.8, 6.4)  # narrow, as its place in the page is, so that the letters stay legible
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.95))  # the page puts a label into the upper corner

    if nll := [(record["current_steps"], record["eval_kd/ce"]) for record in trainer_log if "eval_kd/ce" in record]:
        draw_validation(loss, nll)
    draw_gate(
        figure.add_subplot(grid[1], sharex=loss),
        [record["current_steps"] for record in records],
        [record["kd/hard_ratio"] for record in records],
        [record["kd/difficulty"] for record in records],
    )
