"""The objectives: pure tensor mathematics, and the fused language-model head that computes them chunk by chunk."""

from __future__ import annotations

from llamafactory_sekd.objectives.losses import OBJECTIVES
from llamafactory_sekd.objectives.plain import DistillationOutput, distillation_loss
from llamafactory_sekd.objectives.statistics import TokenStatistics


__all__ = ["OBJECTIVES", "DistillationOutput", "TokenStatistics", "distillation_loss"]
