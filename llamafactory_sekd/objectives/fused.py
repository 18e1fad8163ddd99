"""The objectives fused with the language-model heads: no matrix of tokens times vocabulary ever exists.

The gradient with respect to the student's logits has a closed form, so it is formed in the forward pass, a chunk of
tokens at a time, while the chunk's logits are still there, and reduced at once to the gradients of hidden states and
head. The backward pass only multiplies them with the incoming gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch.autograd.function import once_differentiable

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.objectives.equations import TokenStatistics
from llamafactory_sekd.objectives.head_products import default_chunk_size, product_type
from llamafactory_sekd.objectives.linear_head import IDENTITY, Head, HeadGradients, LogitsSource, LogitTransform
from llamafactory_sekd.objectives.losses import closed_form_of, settings_of
from llamafactory_sekd.objectives.objective_settings import (
    ObjectiveKeys,
    Settings,
    check_same_vocabulary,
    check_tokens,
)
from llamafactory_sekd.objectives.sweep import Sweep


@dataclass(frozen=True, slots=True)
class FusedOutput:
    """The objective of a batch.

    Attributes:
        loss: scalar, float32 (float64 for float64 inputs): the sum over the tokens divided by `num_items`.
        statistics: per token, what training logs.
    """

    loss: torch.Tensor
    statistics: TokenStatistics


@dataclass(frozen=True, slots=True)
class _Plan:
    settings: Settings
    num_items: int | float | torch.Tensor
    chunk_size: int
    vocab_size: int
    may_be_infinite: bool
    grad_enabled: bool
    compile: bool
    transform: LogitTransform


def fused_linear_distillation(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_items: int | torch.Tensor,
    chunk_size: int | None = None,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    student_transform: LogitTransform = IDENTITY,
    teacher_transform: LogitTransform = IDENTITY,
    vocab_size: int | None = None,
    compile: bool = False,
    **keys: Unpack[ObjectiveKeys],
) -> FusedOutput:
    """`distillation_loss` of the heads' logits, summed over the tokens and divided by `num_items`.

    The loss carries gradients for the student's hidden states, head and bias, each formed only where it is required;
    none are formed without grad mode. The gradients are used up by the first backward pass.

    Products are done in the head's type, under autocast in autocast's (which copies heads of another type for the
    duration of the call), in float32 where a CPU has no instructions for that type; everything between logits and
    their gradient in float32, or float64 where a head is.
    `self_evolution_topk` selects over all tokens, see `Sweep`.

    Args:
        student_hidden: `[tokens, student width]`, of response tokens only.
        student_head: `[vocab, student width]`.
        teacher_hidden: `[tokens, teacher width]`; the teacher gets no gradient.
        teacher_head: `[vocab, teacher width]`.
        labels: class ids `[tokens]`, in `[0, vocab_size)`.
        num_items: the divisor, the number of response tokens of the global batch; a 0-dimensional tensor on an
            accelerator is not synchronized with. Zero counts as one.
        chunk_size: tokens whose logits exist at a time; None for `default_chunk_size`.
        student_bias, teacher_bias: `[vocab]`.
        student_transform, teacher_transform: what the models do to the products of their heads, a scale or a soft cap.
        vocab_size: use the first entries of both heads only, the common vocabulary; the gradient of the others is
            zero. Default: all.
        compile: let torch.compile take what is between the logits and their gradient; where it cannot, a line in
            the log says so.
        keys: see `ObjectiveKeys`.

    Raises:
        ArgumentError: shapes that do not fit, different vocabularies, an unknown `kd_loss` or a mapping that cannot
            work, a missing `kd_topk`, a `kd_hard_scale` for another objective.
    """
    check_tokens(student_hidden, teacher_hidden, labels, ("student_hidden", "teacher_hidden"))
    # Models pad their vocabularies to different sizes; to cut a head would be to copy it.
    used = _used_vocabulary(student_head, teacher_head, vocab_size)
    return fused_distillation(
        student_hidden,
        student_head,
        Head(teacher_hidden, teacher_head, teacher_bias, used, product_type(teacher_head), teacher_transform),
        labels,
        num_items=num_items,
        chunk_size=chunk_size,
        student_bias=student_bias,
        student_transform=student_transform,
        compile=compile,
        **keys,
    )


def fused_distillation(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher: LogitsSource,
    labels: torch.Tensor,
    *,
    num_items: int | torch.Tensor,
    chunk_size: int | None = None,
    student_bias: torch.Tensor | None = None,
    student_transform: LogitTransform = IDENTITY,
    compile: bool = False,
    **keys: Unpack[ObjectiveKeys],
) -> FusedOutput:
    """Compute the same for any teacher that can write the logits of a few tokens.

    Args:
        student_hidden, student_head, labels, num_items, chunk_size, student_bias, compile: as in
            `fused_linear_distillation`.
        student_transform: what the student does to the products of its head.
        teacher: of the same tokens, over the first `teacher.vocab_size` entries of the student's head.
        keys: see `ObjectiveKeys`.

    Raises:
        ArgumentError: shapes that do not fit, an unknown `kd_loss` or a mapping that cannot work, a missing
            `kd_topk`, a `kd_hard_scale` for another objective.
    """
    # Everything that can be wrong with the call, before a product of seconds is done.
    chosen = settings_of(**keys)
    check_tokens(student_hidden, student_hidden, labels, ("student_hidden", "student_hidden"))
    if len(teacher) != len(labels) or teacher.vocab_size > len(student_head):
        raise ArgumentError(
            f"the teacher has logits of {len(teacher)} tokens over {teacher.vocab_size} entries, the student of "
            f"{len(labels)} over {len(student_head)}: pass one row per response token and the common vocabulary."
        )
    # One argument for all that autograd has no business with: each argument of a Function needs a gradient or a None.
    plan = _Plan(
        settings=chosen,
        num_items=_divisor(num_items),
        chunk_size=chunk_size
        or default_chunk_size(teacher.vocab_size, product_type(student_head), device=student_head.device),
        vocab_size=teacher.vocab_size,
        # A bias may be -inf, which bans an id; a product of finite numbers cannot be.
        may_be_infinite=student_bias is not None or teacher.may_be_infinite,
        grad_enabled=torch.is_grad_enabled(),
        compile=compile,
        transform=student_transform,
    )
    # One custom Function and not operations that autograd records: these would keep the logits of every chunk.
    loss, values = _FusedDistillation.apply(student_hidden, student_head, student_bias, teacher, labels, plan)
    return FusedOutput(loss=loss, statistics=TokenStatistics.from_rows(values.unbind()))


class _FusedDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: torch.Tensor,
        student_weight: torch.Tensor,
        student_bias: torch.Tensor | None,
        teacher: LogitsSource,
        labels: torch.Tensor,
        plan: _Plan,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Inside of a Function grad mode is always off, so the caller's comes along in the plan.
        # Each gradient costs a product, and LoRA, a frozen head or evaluation need fewer.
        wants = tuple(plan.grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        student_type = product_type(student_weight)
        # The type of the products is chosen; autocast would cast what is summed up in float32 as well.
        with torch.autocast(student_hidden.device.type, enabled=False):
            student = Head(
                student_hidden,
                student_weight,
                student_bias,
                plan.vocab_size,
                student_type,
                plan.transform,
                keeps_slope=any(wants),
            )
            chunks = -(-len(labels) // plan.chunk_size)
            # Formed here, while a chunk's logits exist: in the backward pass they would have to be computed again, two
            # products more in addition to four. The price is that both gradients exist between the passes.
            gradients = HeadGradients(student, student_weight, wants, plan.num_items, chunks)
            values = Sweep(
                student,
                teacher,
                labels,
                plan.settings,
                closed_form_of(plan.settings),
                chunk_size=plan.chunk_size,
                may_be_infinite=plan.may_be_infinite,
                gradients=gradients if any(wants) else None,
                compile=plan.compile,
            ).run()
        # Not `save_for_backward`, which takes tensors alone and would refuse that they are changed in place.
        ctx.gradients = gradients
        # Summed up once over all tokens, so that the loss does not depend on the size of a chunk.
        loss, statistics = values[-1].sum() / plan.num_items, values[:-1]
        # They are what is logged; a loss made of them must not look as if it could be trained on.
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # The buffers have become the `.grad` of the parameters, and the optimizer may have changed them.
        if ctx.gradients is None:
            raise RuntimeError(
                "a second backward pass through the fused distillation loss: its gradients are formed in the forward "
                "pass and handed over by the first backward; compute the loss again, or use distillation_loss."
            )
        # Handed over, not kept: the optimizer's .grad can then take the buffers instead of copying them.
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients.finish(grad_loss), None, None, None)


def _divisor(num_items: int | torch.Tensor) -> float | torch.Tensor:
    """At least one, since a batch may have no tokens; a number where that needs no wait for an accelerator."""
    if isinstance(num_items, torch.Tensor) and num_items.device.type != "cpu":
        return num_items.clamp_min(1)
    return max(float(num_items), 1.0)


def _used_vocabulary(student_head: torch.Tensor, teacher_head: torch.Tensor, vocab_size: int | None) -> int:
    # Which entries mean the same only the caller knows, so different heads without a size are an error.
    if vocab_size is None:
        check_same_vocabulary(
            len(student_head), len(teacher_head), "pass vocab_size, the size of the common vocabulary."
        )
        return len(student_head)
    if not 0 < vocab_size <= min(len(student_head), len(teacher_head)):
        raise ArgumentError(
            f"vocab_size {vocab_size} is not within both heads ({len(student_head)} and {len(teacher_head)} entries): "
            "pass the size of their common vocabulary."
        )
    return vocab_size
