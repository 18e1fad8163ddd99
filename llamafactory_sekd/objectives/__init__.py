"""The objectives: pure tensor mathematics, and the fused language-model head that computes them chunk by chunk."""

from __future__ import annotations

from llamafactory_sekd.objectives.equations import TokenStatistics
from llamafactory_sekd.objectives.fused import FusedOutput, fused_distillation, fused_linear_distillation
from llamafactory_sekd.objectives.head_products import default_chunk_size, product_type
from llamafactory_sekd.objectives.linear_head import IDENTITY, Head, LogitsSource, LogitTransform, SomeTokens
from llamafactory_sekd.objectives.loss_module import IGNORE_INDEX, DistillationLoss, response_positions
from llamafactory_sekd.objectives.losses import OBJECTIVES
from llamafactory_sekd.objectives.losses.users_divergence import try_user_function
from llamafactory_sekd.objectives.plain import DistillationOutput, distillation_loss


__all__ = [
    "IDENTITY",
    "IGNORE_INDEX",
    "OBJECTIVES",
    "DistillationLoss",
    "DistillationOutput",
    "FusedOutput",
    "Head",
    "LogitTransform",
    "LogitsSource",
    "SomeTokens",
    "TokenStatistics",
    "default_chunk_size",
    "distillation_loss",
    "fused_distillation",
    "fused_linear_distillation",
    "product_type",
    "response_positions",
    "try_user_function",
]
