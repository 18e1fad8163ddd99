"""One training step on tensors without content: the real models and the real objective, and no memory or arithmetic.

PyTorch's fake tensors have shapes, types and lifetimes, so what is alive at each moment is what will be alive in
training, whatever the architecture, the adapters or the gradient checkpointing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.lm_head import hidden_states_of, is_plain_product, replaced_forward, selected_rows
from llamafactory_sekd.objectives import IDENTITY, LogitsSource, LogitTransform, default_chunk_size, product_type
from llamafactory_sekd.objectives.blocks import ACCELERATOR_BUFFER, BUFFERS, CPU_BUFFER
from llamafactory_sekd.objectives.head_products import as_on_an_accelerator
from llamafactory_sekd.planner.contentless import (
    AnswerQuestions,
    LiveMemory,
    ModelSize,
    build_without_content,
    size_of,
    to_fake,
    total_size,
)
from llamafactory_sekd.planner.planned_run import Run
from llamafactory_sekd.teacher.source import product
from llamafactory_sekd.trainer.training_step import TrainingStep


@dataclass(frozen=True)
class Rehearsal:
    """What a step needs beyond the models themselves.

    Attributes:
        student, teacher: sizes of the models (the teacher's is None without one, and the sum of several).
        peak: bytes by purpose (`activations`, `gradients`, `objective`, `teacher`) when their sum is largest.
        fused: whether the objective is computed chunk by chunk in the head.
        obstacle: why the step could not be rehearsed (`peak` is empty then); empty where it could.
    """

    student: ModelSize
    teacher: ModelSize | None
    peak: Counter[str]
    fused: bool
    obstacle: str = ""


def rehearse(run: Run) -> Rehearsal:
    """Build the models without content and take one step; of several teachers the largest answers."""
    student = build_without_content(run.student.build)
    blueprints = () if run.teacher is None else (run.teacher, *run.other_teachers)
    teachers = [build_without_content(blueprint.build) for blueprint in blueprints]
    with FakeTensorMode(), AnswerQuestions():
        to_fake(student, run.engine_dtype)
        student_size, sizes = size_of(student, run.student), []
        for model, blueprint in zip(teachers, blueprints, strict=True):
            quantized = blueprint.quantization_bit is not None  # then DeepSpeed does not touch it
            to_fake(model, None if quantized else run.engine_dtype)
            sizes.append(size_of(model, blueprint))

        teacher_size = total_size(sizes) if sizes else None
        teacher = teachers[max(range(len(sizes)), key=lambda place: sizes[place].parameters)] if sizes else None

        try:
            peak, fused = _Stage(run, student, teacher).step()
        except Exception as error:  # a model's own code may do what tensors without content cannot
            obstacle = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            return Rehearsal(student_size, teacher_size, Counter(), False, obstacle)

    return Rehearsal(student_size, teacher_size, peak, fused)


class _Stage:
    """Student, teacher and batch, ready for one step; to be used where tensors have no content."""

    def __init__(self, run: Run, student: nn.Module, teacher: nn.Module | None) -> None:
        self.run = run
        self.student, self.teacher = student.train(), teacher
        if teacher is not None:
            teacher.eval().requires_grad_(False)

        self.tokens = max(1, round(run.responses * run.batch_size * run.length))
        # A mask of four dimensions is what padded batches get from the models; two dimensions would be looked into.
        shape = (run.batch_size, 1, run.length, run.length)
        self.inputs = {
            "input_ids": torch.zeros(run.batch_size, run.length, dtype=torch.int64),
            "attention_mask": torch.ones(shape, dtype=torch.bool),
        }
        self.targets = torch.zeros(self.tokens, dtype=torch.int64)
        self.live = LiveMemory()

    def step(self) -> tuple[Counter[str], bool]:
        """Forward and backward pass; returns the peak and whether the objective was fused with the head."""
        fused = self._is_fused()
        self._watch_gradients()
        for model in (self.student, self.teacher):
            for tensor in () if model is None else (*model.parameters(), *model.buffers()):
                self.live.ignore(tensor)

        with self.live:
            if self.run.accumulation > 1 and not self._gradients_are_sharded:
                for parameter in self.student.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
                        self.live.relabel(parameter.grad, "gradients")

            loss = self._loss(fused)
            loss.backward()

        return self.live.peak, fused

    @property
    def _gradients_are_sharded(self) -> bool:
        return self.run.sharding is not None and self.run.sharding.shards_gradients

    def _watch_gradients(self) -> None:
        def arrived(parameter: torch.Tensor) -> None:
            if self._gradients_are_sharded:
                parameter.grad = None  # reduced to its partition at once
            elif parameter.grad is not None:
                self.live.relabel(parameter.grad, "gradients")

        for parameter in self.student.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(arrived)

    def _forward(self, model: nn.Module, **inputs: Any) -> Any:
        """Run a forward pass as accelerate wraps it: autocast around it, results in float32."""
        if self.run.autocast is None:
            return model(**self.inputs, **inputs, use_cache=False)
        with torch.autocast("cpu", torch.bfloat16):  # float16 takes the same room
            outputs = model(**self.inputs, **inputs, use_cache=False)

        return convert_outputs_to_fp32(lambda: outputs)()

    def _is_fused(self) -> bool:
        models = [self.student, *([self.teacher] if self.teacher is not None else [])]
        if self.run.distillation is None:
            return False
        found = [self._find_transform(model) for model in models]
        self.transform = found[0] or IDENTITY
        return None not in found

    def _find_transform(self, model: nn.Module) -> LogitTransform | None:
        """As :func:`logit_transform`, but tensors without content cannot tell a scale from a cap, which needs more."""
        if not is_plain_product(model.get_output_embeddings()):  # type: ignore[operator]
            return None
        made: list[torch.Tensor] = []

        def head(hidden: torch.Tensor) -> torch.Tensor:
            made.append(hidden.new_zeros(1, 1, 1))
            return made[0]

        with torch.no_grad(), replaced_forward(model.get_output_embeddings(), head):  # type: ignore[operator]
            logits = model(**self.inputs, use_cache=False).logits
        if logits is made[0]:
            return IDENTITY
        return LogitTransform(cap=1.0) if logits is not None and logits.numel() == 1 else None

    def _loss(self, fused: bool) -> torch.Tensor:
        keys = self.run.distillation
        if keys is None:
            labels = torch.zeros(self.run.batch_size, self.run.length, dtype=torch.int64)
            return self._forward(self.student, labels=labels).loss
        return self._fused_loss(keys) if fused else self._plain_loss(keys)

    def _fused_loss(self, keys: DistillationArguments) -> torch.Tensor:
        head: Any = self.student.get_output_embeddings()  # type: ignore[operator]
        chunk_size = keys.kd_chunk_size or self._default_chunk_size(head)
        teacher_hidden, teacher_weight = self._teacher_hidden(head)
        step = self._training_step(head, keys)

        @contextmanager
        def answers(vocab_size: int | None) -> Iterator[LogitsSource]:
            with self.live.labeled("objective"):
                beyond = torch.empty(self._buffers_beyond_a_cpus(self._common_vocabulary(), chunk_size))
                yield product(teacher_hidden, teacher_weight, None, vocab_size)
                del beyond

        with as_on_an_accelerator() if self.run.accelerator else nullcontext():
            _, loss, _ = step.loss_in_head(
                lambda: self._forward(self.student),
                self._responses,
                answers,
                transform=self.transform,
                chunk_size=chunk_size,
            )
        return loss

    def _training_step(self, head: Any, keys: DistillationArguments) -> TrainingStep:
        """Return the trainer's own step; own samples and schedules take no other room."""
        return TrainingStep(
            head, self.targets, self.tokens, lambda _: keys.objective_keywords(), self._common_vocabulary()
        )

    def _teacher_hidden(self, student_head: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the teacher's hidden states of all tokens, and its head (the student's size where cached)."""
        with self.live.labeled("teacher"):
            if self.teacher is None:
                weight = student_head.weight.detach()
                return torch.empty(self.tokens, weight.shape[1], dtype=weight.dtype), weight
            teacher, head = self.teacher, self.teacher.get_output_embeddings()  # type: ignore[operator]
            with torch.no_grad():
                return hidden_states_of(head, lambda: self._forward(teacher), self._responses), head.weight

    def _plain_loss(self, keys: DistillationArguments) -> torch.Tensor:
        step = self._training_step(self.student.get_output_embeddings(), keys)  # type: ignore[operator]
        student_logits = self._row_logits(self.student)
        with torch.no_grad(), self.live.labeled("teacher"):
            teacher = student_logits.detach() if self.teacher is None else self._row_logits(self.teacher)

        with self.live.labeled("objective"):
            return step.loss_of_logits(student_logits, teacher)[0]

    def _row_logits(self, model: nn.Module) -> torch.Tensor:
        """Logits of all tokens as response tokens, `[tokens, vocab]`."""
        with selected_rows(model.get_output_embeddings(), self._responses):  # type: ignore[operator]
            return self._forward(model).logits[0]

    def _responses(self, hidden: torch.Tensor) -> torch.Tensor:
        """As many tokens as responses have, `[tokens, width]`, copied as the selection copies them."""
        return hidden.reshape(-1, hidden.shape[-1])[: self.tokens].clone()

    def _default_chunk_size(self, head: Any) -> int:
        # As the trainer asks for it; where this machine has no such device, with the largest budget.
        device = torch.device("cuda" if self.run.accelerator else "cpu")
        amp = nullcontext() if self.run.autocast is None else torch.autocast("cpu", torch.bfloat16)
        with amp, as_on_an_accelerator() if self.run.accelerator else nullcontext():
            return default_chunk_size(len(head.weight), product_type(head.weight), device=device)

    def _buffers_beyond_a_cpus(self, vocab_size: int, chunk_size: int) -> int:
        """Numbers in the objective's buffers that an accelerator has and a CPU, on which this runs, has not.

        Compiled code plans its own, which are no more.
        """
        rows = (min(numbers // vocab_size, chunk_size, self.tokens) for numbers in (ACCELERATOR_BUFFER, CPU_BUFFER))
        accelerators, cpus = rows
        return BUFFERS * vocab_size * (accelerators - cpus) if self.run.accelerator else 0

    def _common_vocabulary(self) -> int:
        models = [self.student, *([self.teacher] if self.teacher is not None else [])]
        return min(len(model.get_output_embeddings().weight) for model in models)  # type: ignore[operator]
