"""The objectives on logits, by autograd: the reference for the fused path, and its fallback."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch.autograd.function import once_differentiable

from llamafactory_sekd.objectives.blocks import BlockProcessor
from llamafactory_sekd.objectives.equations import (
    Terms,
    TokenStatistics,
    cross_entropy,
    gradient_norms,
    kl_divergence,
    log_target,
    token_statistics,
)
from llamafactory_sekd.objectives.losses import OBJECTIVES, closed_form_of, settings_of
from llamafactory_sekd.objectives.objective_settings import (
    ObjectiveKeys,
    Settings,
    check_same_vocabulary,
    check_tokens,
    select_hard,
)


@dataclass(frozen=True, slots=True)
class DistillationOutput:
    """The objective of every token.

    Attributes:
        loss: `[tokens]`, float32 (float64 for float64 logits), differentiable in the student's logits. Its reduction
            is the caller's: the sum over the tokens divided by the number of response tokens in the global batch.
        hard: bool `[tokens]`: `d > Γ`, or the `kd_topk` most difficult tokens for `self_evolution_topk`. Objectives
            that treat all tokens alike report it without using it.
        statistics: what training logs.
    """

    loss: torch.Tensor
    hard: torch.Tensor
    statistics: TokenStatistics

    @property
    def difficulty(self) -> torch.Tensor:
        """Equation 5, `d = KL(y~ ‖ q)`, `[tokens]`, detached."""
        return self.statistics.difficulty


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    **keys: Unpack[ObjectiveKeys],
) -> DistillationOutput:
    """Return the distillation objective of every response token.

    The mathematics is done in log space, in float32 for float32, bfloat16 and float16 logits and in float64 where one
    of the two is float64. Logits may be `-inf`; terms whose weight is zero contribute exactly nothing. No tokens give
    an empty loss whose sum is a zero with a gradient.

    Args:
        student_logits: `[tokens, vocab]`, floating.
        teacher_logits: `[tokens, vocab]`, floating; no gradient flows into them.
        labels: the ground truth's class ids `[tokens]`, integers in `[0, vocab)`: response tokens only, no padding.
        keys: see `ObjectiveKeys`.

    Raises:
        ArgumentError: shapes that do not fit, different vocabularies, an unknown argument, an unknown `kd_loss` or a
            mapping that cannot work, a missing `kd_topk`, a `kd_hard_scale` for another objective.
    """
    settings = settings_of(**keys)
    check_tokens(student_logits, teacher_logits, labels, ("student_logits", "teacher_logits"))
    check_same_vocabulary(
        student_logits.shape[-1], teacher_logits.shape[-1], "cut both logits to the common vocabulary first."
    )
    precision = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    student_logits, teacher_logits = student_logits.to(precision), teacher_logits.detach().to(precision)

    if settings.formula is not None:
        loss, rows = _FormulaOnLogits.apply(student_logits, teacher_logits, labels, settings)
        statistics = TokenStatistics.from_rows(rows.unbind())
        return DistillationOutput(loss=loss, hard=statistics.hard > 0.5, statistics=statistics)
    terms = _terms(student_logits, teacher_logits, labels, settings)
    statistics = token_statistics(student_logits.detach(), teacher_logits, labels, terms.difficulty, terms.hard)
    loss = OBJECTIVES[settings.kd_loss].equation(terms)
    if settings.kd_hard_scale is not None and loss.requires_grad:
        easy_norm, hard_norm = gradient_norms(terms)
        statistics = replace(statistics, easy_norm=easy_norm, hard_norm=hard_norm)
    return DistillationOutput(loss=loss, hard=terms.hard, statistics=statistics)


class _FormulaOnLogits(torch.autograd.Function):
    """A formula on logits at hand: its gradient is formed with the loss, as in the fused path."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, settings: Settings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        processor = BlockProcessor(
            settings,
            closed_form_of(settings),
            vocab_size=student_logits.shape[-1],
            tokens=len(labels),
            precision=student_logits.dtype,
            device=student_logits.device,
            may_be_infinite=True,
            wants_gradient=ctx.needs_input_grad[0],
        )
        hard = None
        if settings.share is not None:
            scores = processor.scores(student_logits.clone(), teacher_logits.clone(), labels)
            hard = select_hard(scores, settings)
        gradient = student_logits.clone()
        values = processor.process(gradient, teacher_logits.clone(), labels, hard)
        ctx.save_for_backward(gradient)
        loss, statistics = values[-1], values[:-1]
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.unsqueeze(-1), None, None, None


def _terms(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, settings: Settings
) -> Terms:
    temperature = settings.kd_temperature
    log_q = (student_logits / temperature).log_softmax(-1)
    log_q_untempered = log_q if temperature == 1.0 else student_logits.log_softmax(-1)
    log_p = (teacher_logits / temperature).log_softmax(-1)
    target = log_target(log_p, labels, settings.kd_lambda)
    difficulty = kl_divergence(target, log_q.detach())
    return Terms(
        log_q=log_q,
        log_p=log_p,
        log_target=target,
        ce=cross_entropy(log_q_untempered, labels),
        difficulty=difficulty,
        hard=select_hard(difficulty, settings),
        settings=settings,
    )
