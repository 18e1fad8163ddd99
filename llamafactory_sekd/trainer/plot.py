"""The picture of a distillation: hard share and difficulty over the steps."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME


PLOT_NAME = "training_kd.png"


def plot_distillation(output_dir: str | Path) -> Path | None:
    """Draw ``training_kd.png`` from ``trainer_state.json``; return its path, None where there is nothing to draw."""
    state = json.loads((Path(output_dir) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    history = [entry for entry in state["log_history"] if "kd/difficulty" in entry]
    if not history:
        return None

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [entry["step"] for entry in history]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    right = left.twinx()
    (hard,) = left.plot(
        steps, [100 * entry["kd/hard_ratio"] for entry in history], color="#d95f02", label="hard tokens"
    )
    (difficulty,) = right.plot(
        steps, [entry["kd/difficulty"] for entry in history], color="#1f77b4", linestyle="--", label="mean difficulty"
    )
    left.set(xlabel="step", ylabel="hard tokens (%)", ylim=(0, 100))
    right.set(ylabel="mean difficulty d (nats)")
    right.set_ylim(bottom=0)
    left.legend(handles=[hard, difficulty], loc="upper right")
    path = Path(output_dir) / PLOT_NAME
    figure.savefig(path, dpi=120)
    return path
