"""Runs that look healthy and are not: those that learn nothing, and those that are finished already."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from llamafactory_sekd.arguments import DistillationArguments


logger = logging.get_logger(__name__)
_WINDOWS = 3
_NEARLY_ALL, _NEARLY_NONE = 0.98, 0.02


class WarnOfIdleRun(TrainerCallback):
    """Reads every log of the training and warns once of each thing that keeps the student from learning.

    Args:
        distillation: the stage's keys.
    """

    def __init__(self, distillation: DistillationArguments) -> None:
        # Where the share is a key of the run (top-K) or the objective has no hard tokens, it says nothing.
        self._watches_share = distillation.kd_loss == "self_evolution"
        self._shares: deque[float] = deque(maxlen=_WINDOWS)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Look at a log of the training; others have no ``loss``."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        loss, norm = logs["loss"], logs.get("grad_norm")
        broken = [
            name for name, value in (("loss", loss), ("gradient", norm)) if value is not None and not _finite(value)
        ]
        if broken:
            logger.warning_once(
                f"The {' and the '.join(broken)} of the last {args.logging_steps} steps is not finite: the weights no "
                "longer improve. Look at the learning rate, the precision (float16 overflows where bfloat16 does not) "
                "and the teacher's logits (`reverse_kl` is infinite where they are -inf and the student's are not)."
            )
        elif norm == 0.0 or (norm is None and loss == 0.0):
            logger.warning_once(
                f"The gradient of the last {args.logging_steps} steps is exactly zero: the student learns nothing. "
                "Look at `kd_beta` (near 0 the proxy is the target) and `cutoff_len` (is a response left?)."
            )
        if self._watches_share and "kd/hard_ratio" in logs:
            self._shares.append(logs["kd/hard_ratio"])
            self._judge_shares()

    def _judge_shares(self) -> None:
        if len(self._shares) < _WINDOWS:
            return
        if min(self._shares) > _NEARLY_ALL:
            logger.warning_once(
                f"More than {_NEARLY_ALL:.0%} of the tokens are hard over {_WINDOWS} logging windows: nearly all "
                "tokens are spared, and the student learns little. Choose a larger `kd_gamma`, or fine-tune the "
                "student first (docs/choose.md)."
            )
        elif max(self._shares) < _NEARLY_NONE:
            logger.warning_once(
                f"Less than {_NEARLY_NONE:.0%} of the tokens are hard over {_WINDOWS} logging windows: the objective "
                "is `no_evolution` in all but name. Choose a smaller `kd_gamma`, or `auto` (docs/choose.md)."
            )


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return True


class Finished(Exception):
    """The checkpoint that a run resumes from is that of its last step."""


class StopWhenFinished(TrainerCallback):
    """Ends a finished run before its first step: the training loop looks at the limit only after a step."""

    def on_train_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """Raise :class:`Finished` where no step is left."""
        if 0 < state.max_steps <= state.global_step:
            raise Finished
