"""The picture of a distillation: hard share and difficulty over the steps, and loss and validation NLL below them."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from llamafactory_sekd.files import read_json
from llamafactory_sekd.reporting.figures import canvas, draw_gate, draw_validation, finish


PLOT_NAME = "training_kd.png"


def plot_distillation(output_dir: str | Path) -> Path | None:
    """Draw ``training_kd.png`` from ``trainer_state.json``; return its path, None where there is nothing to draw."""
    state = read_json(Path(output_dir) / TRAINER_STATE_NAME)
    history = [entry for entry in state["log_history"] if "kd/difficulty" in entry]
    if not history:
        return None
    nll = [(entry["step"], entry["eval_kd/ce"]) for entry in state["log_history"] if "eval_kd/ce" in entry]
    path = Path(output_dir) / PLOT_NAME
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    with canvas(2 if nll else 1, height=3.6) as (figure, (gate, *others)):
        figure.suptitle("Hard tokens and difficulty during the training")
        draw_gate(
            gate,
            [entry["step"] for entry in history],
            [entry["kd/hard_ratio"] for entry in history],
            [entry["kd/difficulty"] for entry in history],
        )
        for axes in others:
            axes.plot([step for step, _ in losses], [loss for _, loss in losses], marker=".", label="loss")
            axes.set(xlabel="step", ylabel="loss")
            draw_validation(axes, nll)
        path.write_bytes(finish(figure, path.stem, "Hard tokens and difficulty during the training").png)
    return path
