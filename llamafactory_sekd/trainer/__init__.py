"""The trainer: two models, one objective, its metrics."""

from __future__ import annotations

from .plot import plot_distillation
from .trainer import DistillationTrainer


__all__ = ["DistillationTrainer", "plot_distillation"]
