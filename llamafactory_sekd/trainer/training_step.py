"""The loss of one micro-batch, inside the student's head or behind it: the trainer's, and what the planner rehearses.

How a forward pass is made and which rows are the response's is the caller's affair, so the same code runs under any
wrapper of the model, and on tensors without content. The router's loss of mixtures of experts is added to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.utils import logging

from llamafactory_sekd.lm_head import Select, replaced_forward
from llamafactory_sekd.objectives import (
    IDENTITY,
    LogitTransform,
    SomeTokens,
    TokenStatistics,
    distillation_loss,
    fused_distillation,
)
from llamafactory_sekd.teacher.source import Answers


logger = logging.get_logger(__name__)
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # as configurations of transformers name it


@dataclass(frozen=True)
class TokenGroup:
    """Response tokens with an objective of their own: their numbers (None: all) and what differs in its keywords."""

    numbers: torch.Tensor | None = None
    keywords: dict[str, float] = field(default_factory=dict)

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Return the group's rows of ``values``, ``[tokens, …]``."""
        return values if self.numbers is None else values[self.numbers]


def groups_of_tokens(own: torch.Tensor | None, rows: torch.Tensor) -> list[TokenGroup]:
    """Part the response tokens into references and own samples, which are no ground truth: λ is 1 there."""
    if own is None or not bool((own >= 0).any()):
        return [TokenGroup()]

    is_own = (own >= 0).unsqueeze(-1).expand_as(rows)[rows]
    if bool(is_own.all()):
        return [TokenGroup(None, {"kd_lambda": 1.0})]
    return [
        TokenGroup((~is_own).nonzero().squeeze(-1), {}),
        TokenGroup(is_own.nonzero().squeeze(-1), {"kd_lambda": 1.0}),
    ]


@dataclass(frozen=True)
class TrainingStep:
    """What the loss of a micro-batch is computed of.

    Args:
        head: the student's.
        targets: int64 ``[tokens]``, the response tokens.
        num_items: what the sum over the tokens is divided by.
        keywords: the ``kd_*`` arguments of the objective for a group of tokens.
        vocab_size: how many rows of both heads to read, None for all.
        groups: of all tokens.
    """

    head: Any
    targets: torch.Tensor
    num_items: torch.Tensor | int
    keywords: Callable[[TokenGroup], dict[str, Any]]
    vocab_size: int | None = None
    groups: tuple[TokenGroup, ...] = (TokenGroup(),)

    def loss_in_head(
        self,
        forward: Callable[[], Any],
        select: Select,
        answers: Answers,
        *,
        transform: LogitTransform,
        chunk_size: int,
        compile: bool = False,
    ) -> tuple[Any, torch.Tensor, TokenStatistics]:
        """Compute the objective inside of the student's head, where every wrapper has its weight gathered.

        Args:
            forward: the student's forward pass.
            select: from the head's hidden states to those of the response tokens.
            answers: the teacher's, of the same tokens.
            transform: what the student does to the products of its head.
            chunk_size: tokens whose logits exist at a time.
            compile: see ``fused_linear_distillation``.

        Returns:
            What the forward pass returned, the loss, and the statistics per token.
        """
        # The model scales or caps whatever its head returns, the loss as well. What is this small passes a cap
        # unchanged (tanh x = x to the last digit), with a derivative of one, and a power of two costs no digit.
        unit = 1.0 if transform == IDENTITY else 2.0**-30
        caught: list[TokenStatistics] = []

        def objective(hidden: torch.Tensor) -> torch.Tensor:
            weight, bias = self.head.weight, self.head.bias
            hidden = select(hidden)
            with answers(self.vocab_size) as teacher:
                outputs = [
                    fused_distillation(
                        group.of(hidden),
                        weight,
                        teacher if group.numbers is None else SomeTokens(teacher, group.numbers),
                        group.of(self.targets),
                        student_bias=bias,
                        student_transform=transform,
                        num_items=self.num_items,
                        chunk_size=chunk_size,
                        compile=compile,
                        **self.keywords(group),
                    )
                    for group in self.groups
                ]
            caught.append(self._joined([output.statistics for output in outputs]))
            return (sum(output.loss for output in outputs) * unit).reshape(1, 1, 1)  # type: ignore[union-attr]

        with replaced_forward(self.head, objective):
            answer = forward()

        return answer, answer.logits.reshape(()) / (unit * transform.scale), caught[0]

    def loss_of_logits(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor
    ) -> tuple[torch.Tensor, TokenStatistics]:
        """Compute the same on logits ``[tokens, vocab]``; tokens with a broken teacher are left out as well."""
        student_logits = student_logits[:, : self.vocab_size]
        teacher_logits = teacher_logits[:, : self.vocab_size].to(student_logits.device)
        # The largest is NaN where any is, +inf where any is, and -inf (an impossible id) only where all are.
        broken = ~teacher_logits.amax(-1).isfinite()
        teacher_logits = teacher_logits.masked_fill(broken.unsqueeze(-1), 0.0)
        outputs = [
            distillation_loss(
                group.of(student_logits), group.of(teacher_logits), group.of(self.targets), **self.keywords(group)
            )
            for group in self.groups
        ]
        joined = self._joined([output.statistics for output in outputs])
        statistics = replace(joined, teacher_ce=joined.teacher_ce.masked_fill(broken, math.nan))
        losses = [
            output.loss.masked_fill(group.of(broken), 0.0).sum()
            for output, group in zip(outputs, self.groups, strict=True)
        ]
        return torch.stack(losses).sum() / self.num_items, statistics

    def _joined(self, parts: list[TokenStatistics]) -> TokenStatistics:
        """Put the statistics of the groups back into the order of the tokens."""
        if len(parts) == 1:
            return parts[0]
        return TokenStatistics.joined(parts, [group.numbers for group in self.groups if group.numbers is not None])


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
