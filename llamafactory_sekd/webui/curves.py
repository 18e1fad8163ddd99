"""The second curve of the training tab: hard share and difficulty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_distillation_axes(figure: Figure, trainer_log: Sequence[Mapping[str, Any]]) -> None:
    """Draw hard share and mean difficulty below the loss; a log without them leaves the figure as it is.

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

    steps = [record["current_steps"] for record in records]
    left = figure.add_subplot(grid[1], sharex=loss)
    right = left.twinx()
    (hard,) = left.plot(
        steps, [100 * record["kd/hard_ratio"] for record in records], color="#d95f02", marker=".", label="hard tokens"
    )
    (difficulty,) = right.plot(
        steps,
        [record["kd/difficulty"] for record in records],
        color="#1f77b4",
        linestyle="--",
        marker=".",
        label="mean difficulty",
    )
    left.set(xlabel="step", ylabel="hard tokens (%)", ylim=(0, 105))
    right.set_ylabel("mean difficulty d (nats)")
    right.set_ylim(0, 1.1 * max(record["kd/difficulty"] for record in records) or 1)
    left.legend(handles=[hard, difficulty], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
