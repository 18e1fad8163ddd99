"""The objectives as a module for any training loop, from hidden states and heads or from logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.formula import MEAN, Formula
from llamafactory_sekd.objectives.fused import FusedOutput, fused_linear_distillation
from llamafactory_sekd.objectives.losses import is_formula, settings_of
from llamafactory_sekd.objectives.plain import distillation_loss
from llamafactory_sekd.presets import DEFAULT_LOSS, DEFAULTS, expand


IGNORE_INDEX = -100


def response_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the positions whose next token belongs to a response.

    Args:
        labels: ``[batch, length]`` int64, -100 outside of responses, not shifted (the host's collator).

    Returns:
        ``rows``, ``[batch, length]`` bool: the positions that predict a response token; and ``targets``, ``[tokens]``
        int64: the tokens that they predict, in the order in which ``hidden[rows]`` lists them.
    """
    shifted = pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    rows = shifted != IGNORE_INDEX
    return rows, shifted[rows]


class DistillationLoss(nn.Module):
    """An objective of the formula with everything but the models: response tokens, memory, division.

    Labels are those of Hugging Face's collators: `[batch, length]`, -100 outside of responses, not shifted. Hidden
    states and logits are those of every position; only the ones that predict a response token are read. The loss is
    the sum over the response tokens divided by `num_items`: with the number of response tokens of all accumulated
    batches and ranks these change nothing. Without it the divisor is the number in this batch.

    Args:
        kd_loss: the objective: a preset's name or a mapping of the formula (docs/objectives.md).
        vocab_size: the size of the common vocabulary where the heads differ.
        chunk_size: tokens whose logits exist at a time; None for `default_chunk_size`.
        compile: let torch.compile take what is between the logits and their gradient.
        keys: the other `kd_*` arguments of `distillation_loss`.

    Raises:
        ArgumentError: an unknown `kd_loss`, a mapping that cannot work, a missing `kd_topk`, or a threshold that
            follows the training, which is the trainer's.
    """

    def __init__(
        self,
        kd_loss: str | Mapping[str, Any] = DEFAULT_LOSS,
        *,
        vocab_size: int | None = None,
        chunk_size: int | None = None,
        compile: bool = False,
        **keys: Any,
    ) -> None:
        super().__init__()
        formula = settings_of(kd_loss=kd_loss, **keys).formula
        gate = None if formula is None else formula.gate
        if keys.get("kd_gamma") == "auto" or (gate is not None and gate.threshold == MEAN):
            raise ArgumentError("a threshold that follows the training is kept by the trainer: use a number.")
        self.kd_loss, self.keys = kd_loss, keys
        self.vocab_size, self.chunk_size, self.compiles = vocab_size, chunk_size, compile

    def forward(
        self,
        student_hidden: torch.Tensor,
        student_head: nn.Linear,
        teacher_hidden: torch.Tensor,
        teacher_head: nn.Linear,
        labels: torch.Tensor,
        num_items: int | torch.Tensor | None = None,
        progress: float = 0.0,
    ) -> FusedOutput:
        """Return the loss, chunk by chunk: no matrix of tokens times vocabulary exists.

        Args:
            student_hidden: what the student's head reads, `[batch, length, width]`.
            student_head: the student's head.
            teacher_hidden: what the teacher's head reads, of the same tokens.
            teacher_head: the teacher's head.
            labels: `[batch, length]`.
            num_items: the divisor.
            progress: the share of the training that is done, for numbers `{from: a, to: b}`.

        Raises:
            ArgumentError: shapes or vocabularies that do not fit.
        """
        rows, targets = response_positions(labels)
        return fused_linear_distillation(
            student_hidden[rows],
            student_head.weight,
            teacher_hidden[rows],
            teacher_head.weight,
            targets,
            num_items=len(targets) if num_items is None else num_items,
            chunk_size=self.chunk_size,
            student_bias=student_head.bias,
            teacher_bias=teacher_head.bias,
            vocab_size=self.vocab_size,
            compile=self.compiles,
            kd_loss=self._objective(progress),
            **self.keys,
        )

    def of_logits(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        labels: torch.Tensor,
        num_items: int | torch.Tensor | None = None,
        progress: float = 0.0,
    ) -> FusedOutput:
        """Return the same from logits `[batch, length, vocab]`, for models whose logits are more than a product.

        Args:
            student_logits, teacher_logits: of every position.
            labels, num_items, progress: as for `forward`.

        Raises:
            ArgumentError: shapes or vocabularies that do not fit.
        """
        rows, targets = response_positions(labels)
        entries = slice(self.vocab_size)
        output = distillation_loss(
            student_logits[rows][:, entries],
            teacher_logits[rows][:, entries],
            targets,
            kd_loss=self._objective(progress),
            **self.keys,
        )
        divisor = len(targets) if num_items is None else num_items
        divisor = divisor.clamp_min(1) if isinstance(divisor, torch.Tensor) else max(divisor, 1)
        return FusedOutput(loss=output.loss.sum() / divisor, statistics=output.statistics)

    def _objective(self, progress: float) -> str | Formula:
        if not is_formula(self.kd_loss):
            return str(self.kd_loss)
        return expand(self.kd_loss, {**DEFAULTS, **self.keys}).at(lambda start, end: start + (end - start) * progress)
