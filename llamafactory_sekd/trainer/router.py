"""The load-balancing loss of mixtures of experts, which models add only where they are called with labels."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # as configurations of transformers name it


class RouterLoss:
    """Adds what the host's SFT adds: the router's loss times the coefficient of the model's own configuration.

    Args:
        model: the student, unwrapped.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        found = (getattr(config, name, None) for name in _COEFFICIENTS)
        self.coefficient = next((value for value in found if value is not None), 0.0)
        self._sums = torch.zeros(2, dtype=torch.float64)
        self._seen = False

    def of(self, outputs: Any, trains: bool) -> torch.Tensor | float:
        """Return the loss to add for a micro-batch: a scalar, or 0 where the model computes none.

        Args:
            outputs: what the model returned.
            trains: whether a gradient is wanted.
        """
        auxiliary = getattr(outputs, "aux_loss", None)
        if not isinstance(auxiliary, torch.Tensor) or not self.coefficient:
            return 0.0
        loss = self.coefficient * auxiliary.to(torch.float32)
        if trains:
            if not loss.requires_grad:
                logger.warning_once(
                    "The router's loss has no gradient, since gradient checkpointing hides the router from it: set "
                    "`use_reentrant_gc: false`, or remove `moe_aux_loss_coef`."
                )
            self._seen = True
            self._sums = self._sums.to(loss.device) + torch.stack([loss.detach().double(), loss.new_ones(()).double()])
        return loss

    def logs(self, accelerator: Any) -> dict[str, float]:
        """Return the mean over the micro-batches of the window and all ranks, which call this together."""
        if not self._seen:
            return {}
        total, count = accelerator.reduce(self._sums.to(accelerator.device), reduction="sum").tolist()
        self._sums = torch.zeros(2, dtype=torch.float64)
        return {"aux_loss": total / count} if count else {}
