"""The plain path against the naive reference, the identities of the method, and hostile numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import naive_objectives
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.objectives import OBJECTIVES, distillation_loss
from llamafactory_sekd.objectives.objective_settings import above_threshold


KEYS: dict[str, Any] = {"kd_lambda": 0.4, "kd_beta": 0.7, "kd_gamma": 3.0, "kd_topk": None, "kd_temperature": 1.0}
WITH_BETA = ("self_evolution", "self_evolution_topk", "skew", "skew_teacher")


def keys_for(kd_loss: str, **changes: Any) -> dict[str, Any]:
    topk = 0.4 if kd_loss == "self_evolution_topk" else None
    return {**KEYS, "kd_loss": kd_loss, "kd_topk": topk, **changes}


def sample(
    tokens: int = 7, vocab: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    z, w = (2 * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(vocab, (tokens,), generator=generator)
    return z.to(dtype).requires_grad_(), w.to(dtype), labels


def gradient(z: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, **keys: Any) -> torch.Tensor:
    return torch.autograd.grad(distillation_loss(z, w, labels, **keys).loss.sum(), z)[0]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kd_loss", OBJECTIVES)
def test_loss_difficulty_and_hard_tokens_equal_the_naive_reference(kd_loss: str, temperature: float) -> None:
    z, w, labels = sample()
    keys = keys_for(kd_loss, kd_temperature=temperature, kd_gamma=3.0 / temperature)
    output = distillation_loss(z, w, labels, **keys)
    losses, difficulties, hard = naive_objectives.batch(z.tolist(), w.tolist(), labels.tolist(), **keys)
    close(output.loss.detach(), torch.tensor(losses, dtype=torch.float64))
    close(output.difficulty, torch.tensor(difficulties, dtype=torch.float64))
    assert output.hard.tolist() == hard
    assert 0 < sum(hard) < len(hard)
    assert not output.difficulty.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kd_loss", OBJECTIVES)
def test_gradient_equals_central_differences_of_the_naive_reference(kd_loss: str, temperature: float) -> None:
    z, w, labels = sample()
    keys = keys_for(kd_loss, kd_temperature=temperature, kd_gamma=3.0 / temperature)
    hard = distillation_loss(z, w, labels, **keys).hard.tolist()
    expected = [
        naive_objectives.central_differences(
            lambda row, i=i: naive_objectives.token_loss(row, w[i].tolist(), int(labels[i]), hard=hard[i], **keys),
            z[i].tolist(),
        )
        for i in range(len(labels))
    ]
    close(gradient(z, w, labels, **keys), torch.tensor(expected, dtype=torch.float64), 1e-8)


def test_statistics_equal_the_naive_reference_at_temperature_one() -> None:
    z, w, labels = sample()
    statistics = distillation_loss(z, w, labels, **keys_for("skew", kd_temperature=3.0)).statistics
    for i, label in enumerate(labels.tolist()):
        q, p = naive_objectives.softmax(z[i].tolist()), naive_objectives.softmax(w[i].tolist())
        assert statistics.ce[i].item() == pytest.approx(-math.log(q[label]))
        assert statistics.teacher_ce[i].item() == pytest.approx(-math.log(p[label]))
        assert statistics.teacher_kl[i].item() == pytest.approx(naive_objectives.kl(p, q))
        assert statistics.agreement[i].item() == (q.index(max(q)) == p.index(max(p)))
    assert 0 < statistics.agreement.sum() < len(labels)


# The identities of the method, exact in exact arithmetic.


def test_no_evolution_and_forward_kl_have_the_same_gradient() -> None:
    z, w, labels = sample()
    close(gradient(z, w, labels, **keys_for("no_evolution")), gradient(z, w, labels, **keys_for("forward_kl")))


def test_self_evolution_without_hard_tokens_is_no_evolution() -> None:
    z, w, labels = sample()
    all_easy = distillation_loss(z, w, labels, **keys_for("self_evolution", kd_gamma=math.inf))
    close(all_easy.loss, distillation_loss(z, w, labels, **keys_for("no_evolution")).loss)
    assert not all_easy.hard.any()


def test_self_evolution_with_hard_tokens_only_is_skew() -> None:
    z, w, labels = sample()
    all_hard = distillation_loss(z, w, labels, **keys_for("self_evolution", kd_gamma=-1e-9))
    close(all_hard.loss, distillation_loss(z, w, labels, **keys_for("skew")).loss)
    assert all_hard.hard.all()


def test_skew_with_a_proxy_that_is_the_student_is_no_evolution() -> None:
    z, w, labels = sample()
    skew = distillation_loss(z, w, labels, **keys_for("skew", kd_beta=1.0))
    close(skew.loss, distillation_loss(z, w, labels, **keys_for("no_evolution")).loss)


def test_forward_kl_without_teacher_is_supervised_finetuning() -> None:
    z, w, labels = sample()
    loss = distillation_loss(z, w, labels, **keys_for("forward_kl", kd_lambda=0.0)).loss
    close(loss, torch.nn.functional.cross_entropy(z, labels, reduction="none"))


@pytest.mark.parametrize("kd_loss", OBJECTIVES)
def test_a_student_equal_to_its_only_target_has_no_loss_and_no_gradient(kd_loss: str) -> None:
    z, _, labels = sample()
    keys = keys_for(kd_loss, kd_lambda=1.0, kd_temperature=2.0)
    close(distillation_loss(z, z, labels, **keys).loss, torch.zeros(len(labels), dtype=torch.float64))
    close(gradient(z, z.detach(), labels, **keys), torch.zeros_like(z))


def test_gradients_have_the_closed_forms_of_easy_and_hard_tokens() -> None:
    z, w, labels = sample()
    p, q = w.softmax(-1), z.detach().softmax(-1)
    goal = 0.4 * p + 0.6 * torch.nn.functional.one_hot(labels, z.shape[-1]).double()
    close(gradient(z, w, labels, **keys_for("no_evolution")), q - goal)
    r = 0.7 * goal * q / (0.7 * q + 0.3 * goal)
    close(gradient(z, w, labels, **keys_for("skew")), q * r.sum(-1, keepdim=True) - r)


# Every key matters, and only where it should.


@pytest.mark.parametrize("kd_loss", OBJECTIVES)
@pytest.mark.parametrize(
    ("key", "value"),
    [("kd_lambda", 0.6), ("kd_beta", 0.3), ("kd_gamma", 0.4), ("kd_topk", 0.8), ("kd_temperature", 2.0)],
)
def test_a_key_changes_the_loss_exactly_where_the_objective_has_it(kd_loss: str, key: str, value: float) -> None:
    has_key = {
        "kd_beta": kd_loss in WITH_BETA,
        "kd_gamma": kd_loss == "self_evolution",
        "kd_topk": kd_loss == "self_evolution_topk",
    }.get(key, True)
    z, w, labels = sample()
    before = distillation_loss(z, w, labels, **keys_for(kd_loss)).loss
    after = distillation_loss(z, w, labels, **keys_for(kd_loss, **{key: value})).loss
    assert (not torch.allclose(before, after)) == has_key


@pytest.mark.parametrize("kd_loss", OBJECTIVES)
def test_tokens_do_not_influence_each_other(kd_loss: str) -> None:
    """Except through the share of hard tokens, so every token is hard here."""
    z, w, labels = sample()
    keys = keys_for(kd_loss, kd_topk=1.0 if kd_loss == "self_evolution_topk" else None)
    full = distillation_loss(z, w, labels, **keys).loss
    parts = [distillation_loss(z[i : i + 2], w[i : i + 2], labels[i : i + 2], **keys).loss for i in range(0, 7, 2)]
    close(full, torch.cat(parts))
    only_first = torch.autograd.grad(full[0], z)[0]
    assert only_first[0].any()
    assert not only_first[1:].any()


def test_no_gradient_reaches_the_teacher() -> None:
    z, w, labels = sample()
    w.requires_grad_()
    distillation_loss(z, w, labels).loss.sum().backward()
    assert w.grad is None


# Which tokens are hard.


def test_a_token_exactly_on_the_threshold_is_easy() -> None:
    assert above_threshold(torch.tensor([0.3, 0.5, 0.7]), 0.5).tolist() == [False, False, True]


@pytest.mark.parametrize(("share", "number"), [(0.05, 0), (0.1, 1), (0.34, 2), (0.5, 4), (1.0, 7)])
def test_the_most_difficult_share_is_hard(share: float, number: int) -> None:
    z, w, labels = sample()
    output = distillation_loss(z, w, labels, kd_loss="self_evolution_topk", kd_topk=share)
    assert int(output.hard.sum()) == number
    if 0 < number < 7:
        assert output.difficulty[output.hard].min() > output.difficulty[~output.hard].max()


def test_of_equally_difficult_tokens_the_earlier_ones_are_hard() -> None:
    z, w, labels = sample(tokens=1)
    output = distillation_loss(
        z.repeat(6, 1), w.repeat(6, 1), labels.repeat(6), kd_loss="self_evolution_topk", kd_topk=0.5
    )
    assert output.hard.tolist() == [True] * 3 + [False] * 3


# Types and hostile numbers.


@pytest.mark.parametrize("kd_loss", OBJECTIVES)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_low_precision_logits_are_computed_in_float32(
    kd_loss: str, dtype: torch.dtype, precision: torch.dtype
) -> None:
    z, w, labels = sample(dtype=dtype)
    output = distillation_loss(z, w, labels, **keys_for(kd_loss))
    exact = distillation_loss(z.detach().double(), w.double(), labels, **keys_for(kd_loss))
    assert {output.loss.dtype, output.difficulty.dtype, output.statistics.hard.dtype} == {precision}
    close(output.loss.double(), exact.loss, 1e-12 if precision == torch.float64 else 1e-5)
    assert torch.autograd.grad(output.loss.sum(), z)[0].dtype == dtype


@pytest.mark.parametrize("kd_loss", OBJECTIVES)
def test_entries_masked_in_both_models_are_as_if_they_were_not_there(kd_loss: str) -> None:
    z, w, labels = sample()
    keys = keys_for(kd_loss)
    masked = torch.full((7, 2), -math.inf, dtype=torch.float64)
    padded = torch.cat([z.detach(), masked], 1).requires_grad_()
    output = distillation_loss(padded, torch.cat([w, masked], 1), labels, **keys)
    close(output.loss, distillation_loss(z, w, labels, **keys).loss)
    wide = torch.autograd.grad(output.loss.sum(), padded)[0]
    close(wide, torch.cat([gradient(z, w, labels, **keys), torch.zeros_like(masked)], 1))


@pytest.mark.parametrize("kd_loss", OBJECTIVES)
def test_a_student_that_excludes_what_the_teacher_wants_gives_infinity_and_finite_gradients(kd_loss: str) -> None:
    z, w, labels = sample()
    other = (labels + 1) % 5
    z = z.detach().scatter(1, other.unsqueeze(1), -math.inf).requires_grad_()
    output = distillation_loss(z, w, labels, **keys_for(kd_loss, kd_gamma=-1.0, kd_topk=1.0))
    assert output.difficulty.isposinf().all()
    # The proxy holds the target, so the hard loss stays finite; so does KL(q ‖ p), whose weight is zero there.
    finite = kd_loss in ("self_evolution", "self_evolution_topk", "skew", "skew_teacher", "reverse_kl")
    assert output.loss.isfinite().all() if finite else output.loss.isposinf().all()
    assert torch.autograd.grad(output.loss.sum(), z)[0].isfinite().all()


@pytest.mark.parametrize("kd_loss", OBJECTIVES)
def test_a_teacher_that_excludes_entries_gives_no_nan(kd_loss: str) -> None:
    z, w, labels = sample()
    w[:, 0] = -math.inf
    output = distillation_loss(z, w, labels, **keys_for(kd_loss))
    assert not output.loss.isnan().any()
    if kd_loss != "reverse_kl":  # there KL(q ‖ p) is infinite, and so is its slope
        assert output.loss.isfinite().all()
        assert torch.autograd.grad(output.loss.sum(), z)[0].isfinite().all()


@given(
    seed=st.integers(0, 10**6),
    kd_loss=st.sampled_from(sorted(OBJECTIVES)),
    kd_lambda=st.sampled_from([0.0, 1e-6, 0.5, 1.0]),
    kd_beta=st.sampled_from([0.0, 1e-6, 0.5, 1.0]),
    kd_temperature=st.sampled_from([0.1, 1.0, 10.0]),
    spread=st.sampled_from([1e-3, 1.0, 50.0, 1e4]),
    shift=st.sampled_from([0.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=150, deadline=None)
def test_extreme_logits_and_keys_give_finite_losses_and_gradients(
    seed: int,
    kd_loss: str,
    kd_lambda: float,
    kd_beta: float,
    kd_temperature: float,
    spread: float,
    shift: float,
    dtype: torch.dtype,
) -> None:
    z, w, labels = sample(tokens=4, vocab=6, seed=seed)
    z = (z.detach() * spread + shift).to(dtype).requires_grad_()
    w = (w * spread - shift).to(dtype)
    keys = keys_for(kd_loss, kd_lambda=kd_lambda, kd_beta=kd_beta, kd_temperature=kd_temperature)
    output = distillation_loss(z, w, labels, **keys)
    assert output.loss.isfinite().all()
    assert (output.loss > -1e-3).all()
    assert torch.autograd.grad(output.loss.sum(), z)[0].isfinite().all()


@pytest.mark.parametrize("kd_loss", OBJECTIVES)
def test_no_tokens_give_a_zero_with_a_gradient_path(kd_loss: str) -> None:
    z, w, labels = torch.empty(0, 5, requires_grad=True), torch.empty(0, 5), torch.empty(0, dtype=torch.long)
    output = distillation_loss(z, w, labels, **keys_for(kd_loss))
    total = output.loss.sum()
    total.backward()
    assert total.item() == 0.0
    assert z.grad is not None
    assert z.grad.shape == (0, 5)
    assert output.hard.shape == output.difficulty.shape == (0,)


# Misuse.


def test_an_unknown_objective_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(ArgumentError, match=r"`kd_loss: sft` is unknown: use one of self_evolution, .*reverse_kl"):
        distillation_loss(*sample(), kd_loss="sft")


def test_a_missing_share_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"`kd_topk` is missing: .* above 0 and up to 1"):
        distillation_loss(*sample(), kd_loss="self_evolution_topk")


def test_different_vocabularies_are_refused() -> None:
    z, w, labels = sample()
    with pytest.raises(ArgumentError, match=r"5 vocabulary entries, the teacher 4: cut both"):
        distillation_loss(z, w[:, :4], labels)


def test_unflattened_logits_and_missing_labels_are_refused() -> None:
    z, w, labels = sample()
    with pytest.raises(ArgumentError, match=r"student_logits has shape \[1, 7, 5\]: two dimensions"):
        distillation_loss(z.unsqueeze(0), w, labels)
    with pytest.raises(ArgumentError, match=r"disagree about the number of tokens"):
        distillation_loss(z, w, labels[:3])
