"""The factor of the hard tokens' loss: what it does, what it is chosen from, and why hard tokens need one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import naive_objectives

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.objectives import OBJECTIVES, distillation_loss, fused_linear_distillation
from llamafactory_sekd.objectives.losses import closed_forms


WITH_HARD_TOKENS = ["self_evolution", "self_evolution_topk"]
KEYS: dict[str, Any] = {"kd_lambda": 0.4, "kd_beta": 0.7, "kd_gamma": 3.0, "kd_topk": None, "kd_temperature": 1.0}


def keys_for(kd_loss: str, **changes: Any) -> dict[str, Any]:
    topk = 0.4 if kd_loss == "self_evolution_topk" else None
    return {**KEYS, "kd_loss": kd_loss, "kd_topk": topk, **changes}


def sample(tokens: int = 7, vocab: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, w = (2 * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    return z.requires_grad_(), w, torch.randint(vocab, (tokens,), generator=generator)


def fused(z: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, **keys: Any) -> Any:
    """With an identity for the heads the hidden states are the logits."""
    head = torch.eye(z.shape[1], dtype=z.dtype)
    return fused_linear_distillation(z, head, w, head, labels, num_items=1, chunk_size=3, **keys)


def gradient(z: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, **keys: Any) -> torch.Tensor:
    return torch.autograd.grad(fused(z, w, labels, **keys).loss, z)[0]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [2.5, torch.tensor(2.5, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kd_loss", WITH_HARD_TOKENS)
def test_hard_tokens_are_multiplied_and_nothing_else(kd_loss: str, temperature: float, scale: Any) -> None:
    z, w, labels = sample()
    keys = keys_for(kd_loss, kd_temperature=temperature, kd_gamma=3.0 / temperature)
    plain = distillation_loss(z, w, labels, kd_hard_scale=scale, **keys)
    losses, _, hard = naive_objectives.batch(z.tolist(), w.tolist(), labels.tolist(), **keys)
    assert 0 < sum(hard) < len(hard)
    expected = [loss * (2.5 if is_hard else 1.0) for loss, is_hard in zip(losses, hard, strict=True)]
    close(plain.loss.detach(), torch.tensor(expected, dtype=torch.float64))
    ours = fused(z, w, labels, kd_hard_scale=scale, **keys)
    close(ours.loss, plain.loss.sum())

    slopes = [
        naive_objectives.central_differences(
            lambda row, i=i: (
                (2.5 if hard[i] else 1.0)
                * naive_objectives.token_loss(row, w[i].tolist(), int(labels[i]), hard=hard[i], **keys)
            ),
            z[i].tolist(),
        )
        for i in range(len(labels))
    ]
    for loss in (plain.loss.sum(), ours.loss):
        close(torch.autograd.grad(loss, z)[0], torch.tensor(slopes, dtype=torch.float64), 1e-8)


@pytest.mark.parametrize("kd_beta", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kd_loss", WITH_HARD_TOKENS)
def test_the_norms_are_those_of_the_easy_and_the_hard_gradient_of_the_hard_tokens(
    kd_loss: str, temperature: float, kd_beta: float
) -> None:
    z, w, labels = sample()
    keys = keys_for(kd_loss, kd_temperature=temperature, kd_gamma=3.0 / temperature, kd_beta=kd_beta)
    plain = distillation_loss(z, w, labels, kd_hard_scale=4.0, **keys).statistics
    ours = fused(z, w, labels, kd_hard_scale=4.0, **keys).statistics
    for name, pure in (("easy_norm", "no_evolution"), ("hard_norm", "skew")):
        expected = [
            is_hard
            * math.hypot(
                *naive_objectives.central_differences(
                    lambda row, i=i, pure=pure: naive_objectives.token_loss(
                        row, w[i].tolist(), int(labels[i]), hard=True, **{**keys, "kd_loss": pure}
                    ),
                    z[i].tolist(),
                )
            )
            / temperature
            for i, is_hard in enumerate(plain.hard.tolist())
        ]
        close(getattr(plain, name), torch.tensor(expected, dtype=torch.float64), 1e-8)
        close(getattr(ours, name), getattr(plain, name))


def test_the_selection_used_on_accelerators_gives_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    z, w, labels = sample()
    keys = keys_for("self_evolution", kd_hard_scale=2.5)
    expected, output = gradient(z, w, labels, **keys), fused(z, w, labels, **keys)
    monkeypatch.setattr(
        closed_forms, "_self_evolution_on_rows", lambda block, _: closed_forms._self_evolution_everywhere(block)
    )
    close(gradient(z, w, labels, **keys), expected)
    close(fused(z, w, labels, **keys).statistics.hard_norm, output.statistics.hard_norm)


def test_a_factor_that_is_the_ratio_of_the_norms_gives_hard_tokens_the_mean_norm_of_the_easy_loss() -> None:
    z, w, labels = sample(tokens=40)
    keys = keys_for("self_evolution")
    statistics = fused(z, w, labels, kd_hard_scale=1.0, **keys).statistics
    hard = statistics.hard.bool()
    balanced = (statistics.easy_norm.sum() / statistics.hard_norm.sum()).item()
    assert balanced > 1
    norms = gradient(z, w, labels, kd_hard_scale=balanced, **keys)[hard].norm(dim=-1)
    easy_norms = gradient(z, w, labels, **keys_for("no_evolution"))[hard].norm(dim=-1)
    close(norms.mean(), easy_norms.mean())


@pytest.mark.parametrize("kd_loss", WITH_HARD_TOKENS)
def test_without_a_factor_or_a_gradient_no_norm_is_measured(kd_loss: str) -> None:
    z, w, labels = sample()
    keys = keys_for(kd_loss)
    outputs = [path(z, w, labels, **keys) for path in (distillation_loss, fused)]
    with torch.no_grad():
        outputs += [path(z, w, labels, kd_hard_scale=2.0, **keys) for path in (distillation_loss, fused)]
    for output in outputs:
        assert output.statistics.easy_norm is None
        assert output.statistics.hard_norm is None
    close(outputs[3].loss, fused(z, w, labels, kd_hard_scale=2.0, **keys).loss.detach())


@pytest.mark.parametrize("kd_loss", sorted(set(OBJECTIVES) - set(WITH_HARD_TOKENS)))
def test_objectives_without_hard_tokens_refuse_a_factor(kd_loss: str) -> None:
    for path in (distillation_loss, fused):
        with pytest.raises(ArgumentError, match=f"`kd_loss: {kd_loss}` treats all tokens alike"):
            path(*sample(), **keys_for(kd_loss, kd_hard_scale=1.0))


def test_hostile_logits_give_finite_norms_and_gradients() -> None:
    z, w, labels = sample()
    w[0, int(labels[0]) - 1] = -math.inf
    far = (z.detach() * 1e4).scatter(1, ((labels + 1) % 5).unsqueeze(1), -math.inf).requires_grad_()
    for student in (z, far):
        plain = distillation_loss(student, w, labels, **keys_for("self_evolution", kd_gamma=-1.0, kd_hard_scale=50.0))
        assert plain.loss.isfinite().all()
        assert torch.autograd.grad(plain.loss.sum(), student)[0].isfinite().all()
        assert plain.statistics.easy_norm.isfinite().all()
        assert plain.statistics.hard_norm.isfinite().all()


# How much weaker hard tokens are: the limits that docs/objectives.md states.


def one_token(student: list[float], teacher: list[float], **keys: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Easy and hard gradient of a token whose ground truth is entry 0."""
    z, w = (torch.tensor([row], dtype=torch.float64).log() for row in (student, teacher))
    z.requires_grad_()
    pair = [gradient(z, w, torch.tensor([0]), **keys_for(loss, **keys))[0] for loss in ("no_evolution", "skew")]
    return pair[0], pair[1]


@pytest.mark.parametrize("kd_beta", [0.3, 0.5, 0.9])
def test_without_a_teacher_the_hard_gradient_is_the_easy_one_times_the_students_share_of_the_proxy(kd_beta) -> None:
    for truth in (0.5, 1e-2, 1e-6):
        easy, hard = one_token(
            [truth, (1 - truth) / 2, (1 - truth) / 2], [0.2, 0.3, 0.5], kd_lambda=0.0, kd_beta=kd_beta
        )
        close(hard, kd_beta * truth / (kd_beta * truth + 1 - kd_beta) * easy)


@pytest.mark.parametrize("kd_beta", [0.3, 0.5, 0.9])
def test_the_pull_towards_an_unlikely_ground_truth_falls_with_its_probability(kd_beta) -> None:
    for truth in (1e-6, 1e-9):
        student, teacher = [truth, 0.7, 0.3 - truth], [0.2, 0.3, 0.5]
        easy, hard = one_token(student, teacher, kd_lambda=0.5, kd_beta=kd_beta)
        assert easy[0].item() == pytest.approx(-(0.5 + 0.5 * 0.2), rel=1e-5)
        # q_y Σr - r_y, with r_y going to β / (1-β) q_y
        target = [0.6, 0.15, 0.25]
        share = sum(kd_beta * t * q / (kd_beta * q + (1 - kd_beta) * t) for t, q in zip(target, student, strict=True))
        assert hard[0].item() / truth == pytest.approx(share - kd_beta / (1 - kd_beta), rel=1e-4)
        assert 0 < share < kd_beta
        assert hard.norm() > 1e-2  # the teacher's part of the target still pulls


@pytest.mark.parametrize("kd_beta", [0.3, 0.5, 0.9])
def test_close_to_the_target_the_hard_gradient_is_the_easy_one_times_beta_squared(kd_beta) -> None:
    easy, hard = one_token([0.6 + 1e-7, 0.15 - 1e-7, 0.25], [0.2, 0.3, 0.5], kd_lambda=0.5, kd_beta=kd_beta)
    torch.testing.assert_close(hard, kd_beta**2 * easy, rtol=1e-4, atol=1e-12)
