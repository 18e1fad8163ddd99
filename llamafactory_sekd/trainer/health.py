"""Runs that look healthy and are not: those that learn nothing, and those that are finished already."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations.deepspeed import deepspeed_config
from transformers.utils import logging

from llamafactory_sekd.arguments import DistillationArguments


logger = logging.get_logger(__name__)
_WINDOWS = 3
_NEARLY_ALL, _NEARLY_NONE = 0.98, 0.02
_ZERO = 1e-6  # a mean loss that is rounding alone
_MOVED = 0.3  # embeddings of tokens that do not occur never move


class WarnOfIdleRun(TrainerCallback):
    """Reads every log of the training and warns once of each thing that keeps the student from learning.

    Args:
        distillation: the stage's keys.
    """

    def __init__(self, distillation: DistillationArguments) -> None:
        self._kd_loss, self._formula = distillation.kd_loss, distillation.formula()
        # Where the share is a key of the run (top-K) or the objective has no hard tokens, it says nothing.
        gate = self._formula.gate
        self._watches_share = gate is not None and gate.threshold is not None
        self._shares: deque[float] = deque(maxlen=_WINDOWS)
        self._weights: list[tuple[Any, torch.Tensor]] = []
        self._windows = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Remember a few values of each weight that is trained."""
        trained = [] if model is None else [weight for weight in model.parameters() if weight.requires_grad]
        self._weights = [(weight, _some_values(weight)) for weight in trained]
        self._windows = 0
        warmup = args.get_warmup_steps(state.max_steps)
        if 0 < state.max_steps <= warmup and state.is_world_process_zero:
            logger.warning_once(
                f"The learning rate warms up for {warmup} steps, and the run has {state.max_steps}: it never reaches "
                f"`learning_rate: {args.learning_rate}`. Lower `warmup_steps` or `warmup_ratio`."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge a run of few logs as well, and what it leaves behind."""
        if state.global_step == 0:
            return
        self._judge_weights(state)
        model = kwargs.get("model")
        trained = [] if model is None else [weight for weight in model.parameters() if weight.requires_grad]
        if state.is_world_process_zero and not all(_some_values(weight).isfinite().all() for weight in trained):
            logger.warning_once(
                f"The weights are not finite after {state.global_step} steps: the model cannot be used. Look at "
                "`learning_rate`, `max_grad_norm` and the precision (float16 overflows where bfloat16 does not)."
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Look at a log of the training, or at the sum of a run that has none; others have neither of the losses."""
        if not logs or not state.is_world_process_zero:
            return
        if self._windows == 0 and abs(logs.get("train_loss", 1.0)) < _ZERO:
            self._tell_of_zero("mean loss of the run is zero")
        if "loss" not in logs:
            return
        self._windows += 1
        if self._windows >= _WINDOWS and state.global_step > args.get_warmup_steps(state.max_steps):
            self._judge_weights(state)
        loss, norm = logs["loss"], logs.get("grad_norm")
        # transformers leaves a loss that is not finite out of what it logs (`logging_nan_inf_filter`); the student's
        # cross-entropy shows it.
        seen = {"loss": (loss, logs.get("kd/ce")), "gradient": (norm,)}
        broken = [
            name for name, values in seen.items() if not all(_finite(value) for value in values if value is not None)
        ]
        if broken:
            logger.warning_once(
                f"The {' and the '.join(broken)} of the last {args.logging_steps} steps is not finite: the weights no "
                "longer improve. Look at the learning rate, the precision (float16 overflows where bfloat16 does not) "
                "and the teacher's logits (`reverse_kl` is infinite where they are -inf and the student's are not)."
            )
        elif norm == 0.0 or (norm is None and loss == 0.0):
            self._tell_of_zero(f"gradient of the last {args.logging_steps} steps is exactly zero")
        if self._watches_share and "kd/hard_ratio" in logs:
            self._shares.append(logs["kd/hard_ratio"])
            self._judge_shares()

    def _tell_of_zero(self, what: str) -> None:
        of_gate = "" if self._formula.gate is None else ", at the gate of `kd_loss` (does it select a token?)"
        logger.warning_once(
            f"The {what}: the student learns nothing. Look at `kd_beta` (near 0 the proxy is the target){of_gate}, at "
            "`cutoff_len` (is a response left?) and at `teacher_model` (is it the student?)."
        )

    def _judge_weights(self, state: Any) -> None:
        """Warn where no weight has moved, which neither the loss nor the gradient's norm shows."""
        before, self._weights = self._weights, []
        if not before or not state.is_world_process_zero:
            return
        rate = next((log["learning_rate"] for log in reversed(state.log_history) if "learning_rate" in log), None)
        at = f" (learning rate {rate})" if rate is not None else ""
        moved = sum(int((_some_values(weight) != old).sum()) for weight, old in before)
        share = moved / max(1, sum(old.numel() for _, old in before))
        if moved == 0:
            logger.warning_once(
                f"No weight has moved in {state.global_step} steps{at}: the student learns "
                "nothing. Look at `learning_rate` and what divides the step (`adam_epsilon`, `max_grad_norm`), and at "
                "`pure_bf16`, in which a step that is small next to its weight is rounded away."
            )
        elif share < _MOVED and all(_is_its_own_master(weight) for weight, _ in before):
            logger.warning_once(
                f"Only {share:.1%} of the weights have moved in {state.global_step} steps{at}: "
                "their precision rounds steps away that are small next to a weight. Set `bf16: true` in place of "
                "`pure_bf16`, or raise `learning_rate`."
            )

    def _judge_shares(self) -> None:
        if len(self._shares) < _WINDOWS:
            return
        nearly_all, nearly_none = min(self._shares) > _NEARLY_ALL, max(self._shares) < _NEARLY_NONE
        if not nearly_all and not nearly_none:
            return
        share = f"More than {_NEARLY_ALL:.0%}" if nearly_all else f"Less than {_NEARLY_NONE:.0%}"
        if self._kd_loss != "self_evolution":
            meaning = self._meaning_of_gate(nearly_all)
        elif nearly_all:
            meaning = (
                "nearly all tokens are spared, and the student learns little. Choose a larger `kd_gamma`, or "
                "fine-tune the student first (docs/choose.md)."
            )
        else:
            meaning = (
                "the objective is `no_evolution` in all but name. Choose a smaller `kd_gamma`, or `auto` "
                "(docs/choose.md)."
            )
        logger.warning_once(f"{share} of the tokens are hard over {_WINDOWS} logging windows: {meaning}")

    def _meaning_of_gate(self, nearly_all: bool) -> str:
        """Return what it means that the gate of a formula selects nearly all tokens, or nearly none."""
        used, idle = ("hard", "easy") if nearly_all else ("easy", "hard")
        side = self._formula.hard if nearly_all else self._formula.easy
        meaning = f"`{used}` of `kd_loss` is the loss of nearly all tokens, and `{idle}` of hardly any."
        if side is not None and side.weight == 0.0:
            meaning += f" The weight of `{used}` is 0: the student learns from hardly any token."
        return f"{meaning} Look at the threshold of its gate."


def _some_values(weight: Any) -> torch.Tensor:
    """Return up to 16 values, spread over a weight or over the shard of it that is here."""
    shard = getattr(weight, "ds_tensor", weight).detach()
    flat = getattr(shard, "_local_tensor", shard).flatten()
    return flat[:: max(1, len(flat) // 16)].clone().cpu()


def _is_its_own_master(weight: Any) -> bool:
    """Whether the optimizer steps in half precision, and not on copies in float32 that DeepSpeed keeps."""
    return weight.dtype in (torch.bfloat16, torch.float16) and deepspeed_config() is None


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
