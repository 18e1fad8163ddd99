"""Every causal language model of transformers is distilled by the loss and the gradients of the plain computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import BUILT, PAD, VOCABULARY, build
from transformers import Seq2SeqTrainingArguments

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.teacher.model import Teacher
from llamafactory_sekd.trainer import DistillationTrainer


GAMMA = 4.0  # so that some tokens are hard and some are not
SEED = 7  # of dropout


def batch() -> dict[str, torch.Tensor]:
    """Two sequences of different lengths; the labels begin after the prompts."""
    draw = torch.Generator().manual_seed(2)
    ids, mask = torch.full((2, 24), PAD), torch.zeros(2, 24, dtype=torch.long)
    labels = torch.full((2, 24), -100)
    for row, (prompt, length) in enumerate(((5, 24), (3, 11))):
        ids[row, :length] = torch.randint(4, VOCABULARY, (length,), generator=draw)
        mask[row, :length] = 1
        labels[row, prompt:length] = ids[row, prompt:length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_as_written(student: Any, teacher: Any) -> torch.Tensor:
    """Compute Self-Evolution KD on the logits that the models return at every position, in float64."""
    inputs = batch()
    labels = inputs.pop("labels")[:, 1:]
    torch.manual_seed(SEED)
    rows = labels != -100
    z = student(**inputs, use_cache=False).logits[:, :-1].double()[rows]
    with torch.no_grad():
        p = teacher(**inputs, use_cache=False).logits[:, :-1].double()[rows].softmax(-1)
    q = z.softmax(-1)
    target = 0.5 * p + 0.5 * torch.nn.functional.one_hot(labels[rows], p.shape[-1])
    difficulty = (target * (target / q).log()).sum(-1)
    hard = (target * (target / (0.5 * q + 0.5 * target)).log()).sum(-1)
    return torch.where(difficulty > GAMMA, hard, difficulty).mean()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_loss_and_gradients_in_the_head_are_those_of_all_logits(name: str, tmp_path: Path) -> None:
    teacher = build(name, seed=9)
    plain, student = build(name).train(), build(name).train()  # two: some models remember their last batch
    expected = loss_as_written(plain, teacher)
    expected.backward()

    trainer = DistillationTrainer(
        model=student,
        args=Seq2SeqTrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True),
        make_teacher=lambda accelerator: Teacher(build(name, seed=9), accelerator),
        distillation=DistillationArguments(kd_loss="self_evolution", kd_gamma=GAMMA, teacher_model="a folder"),
    )
    torch.manual_seed(SEED)
    found = trainer.compute_loss(student, batch())
    found.backward()

    assert trainer._fused is True
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    wanted, ours = gradients(plain), gradients(student)
    assert ours.keys() == wanted.keys()
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    for part, gradient in wanted.items():
        torch.testing.assert_close(ours[part], gradient, rtol=1e-3, atol=1e-3 * largest, msg=part)
