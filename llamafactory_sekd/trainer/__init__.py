"""The trainer: two models, one objective, its metrics."""

from __future__ import annotations

from llamafactory_sekd.trainer.plot import plot_distillation
from llamafactory_sekd.trainer.trainer import DistillationTrainer


__all__ = ["DistillationTrainer", "plot_distillation"]
