"""The formula, on logits and inside the head: a naive reference with finite differences, and hostile numbers."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import naive_formula

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.formula import DIVERGENCES, MEAN, SIGNALS, TARGETS, Formula, parse
from llamafactory_sekd.objectives import (
    OBJECTIVES,
    LogitTransform,
    compiling,
    distillation_loss,
    fused_linear_distillation,
    head_products,
)
from llamafactory_sekd.objectives.losses import elementwise
from llamafactory_sekd.objectives.losses.users_divergence import try_user_function
from llamafactory_sekd.presets import PRESETS, expand


KEYS = {"kd_lambda": 0.4, "kd_beta": 0.7, "kd_gamma": 3.0, "kd_topk": 0.4, "kd_temperature": 1.0}
SQUARES = "user_functions:squares"
ALONE: dict[str, Any] = {
    **{f"{goal} {name}": {"target": goal, "divergence": name} for name in DIVERGENCES for goal in TARGETS},
    "skewed jsd": {"divergence": "jsd", "mix": 0.2, "skew": 0.6},
    "skewed adaptive_kl": {"divergence": "adaptive_kl", "head": 0.8, "skew": 0.6},
    "skewed reverse_kl": {"divergence": "reverse_kl", "skew": 0.6},
    "alpha_beta with beta 0": {"divergence": "alpha_beta", "alpha": 0.5, "beta": 0},
    "alpha_beta with alpha 0": {"divergence": "alpha_beta", "alpha": 0, "beta": 0.5},
    "a user's": {"divergence": SQUARES},
    "a user's, skewed": {"divergence": SQUARES, "skew": 0.6, "target": "teacher", "lambda": 0.8},
    "a sum": {"divergence": {"kl": 0.5, "tvd": 2, SQUARES: 1}},
    "weights": {"divergence": "kl", "weight": 3, "temperature": 2},
    "interpolated": {"divergence": "jsd", "interpolation": 0.3, "skew": 0.8, "temperature": 2},
    "no teacher": {"divergence": "kl", "lambda": 0},
    "no teacher next to cross-entropy": {"divergence": "tvd", "lambda": 0, "target": "teacher"},
    "no reference": {"divergence": "reverse_kl", "lambda": 1, "target": "teacher"},
}  # fmt: skip
SIDES = {
    "easy": {"divergence": "kl", "skew": 0.8, "temperature": 1.5},
    "hard": {"divergence": "reverse_kl", "lambda": 0.9, "weight": 2, "temperature": 3},
}
GATES = {
    "difficulty": {"above": 1.2},
    "teacher_probability": {"below": 0.1},
    "student_probability": {"below": 0.1},
    "teacher_entropy": {"above": 0.8},
    "student_entropy": {"share": 0.3},
    "hellinger": {"above": 0.6, "width": 0.2},
    "agreement": {"above": 0.5},
}
GATED = {name: {"gate": {"signal": name, **gate}, **SIDES} for name, gate in GATES.items()}
COOLED = {
    "cooled": {"gate": {"signal": "hellinger", "above": 0.5, "cooling": 0.6}, "easy": {"divergence": "adaptive_kl"}},
    "cooled below, smoothly": {
        "gate": {"signal": "teacher_probability", "below": 0.2, "width": 0.1, "cooling": 1.5},
        "easy": {"divergence": "kl", "temperature": 2, "interpolation": 0.5},
        "hard": {"divergence": "tvd", "skew": 0.8},
    },
}
MAPPINGS = {**ALONE, **GATED, **COOLED}


@pytest.fixture(autouse=True)
def the_users_folder(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(helpers.__file__).parent))


def formula_of(name: str) -> Formula:
    formula = expand(name, KEYS) if name in PRESETS else parse(MAPPINGS[name], kd_lambda=0.4)
    gate = formula.gate
    if gate is not None and gate.threshold == MEAN:  # which the trainer would keep
        formula = replace(formula, gate=replace(gate, threshold=0.5))
    return formula.at(lambda start, _: start)


def sample(tokens=11, vocab=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, w = (2 * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    z[3] = w[3] + 0.2 * z[3]
    z[5] = w[5] + 0.1 * z[5]
    w[7] = 4 * w[7]
    labels = torch.randint(vocab, (tokens,), generator=generator)
    return z.to(dtype).requires_grad_(), w.to(dtype), labels


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", [*PRESETS, *MAPPINGS])
def test_loss_gradient_and_gate_equal_the_naive_reference(name):
    z, w, labels = sample()
    formula = formula_of(name)
    output = distillation_loss(z, w, labels, kd_loss=formula)
    losses, gradients, signals, degrees = naive_formula.batch(
        z.tolist(), w.tolist(), labels.tolist(), formula.mapping()
    )
    close(output.loss.detach(), double(losses))
    close(torch.autograd.grad(output.loss.sum(), z)[0], double(gradients), 1e-7)
    close(output.statistics.signal, double(signals))
    close(output.statistics.hard, double(degrees))
    assert formula.gate is None or 0 < sum(degrees) < len(degrees)


def test_every_signal_and_every_divergence_is_among_them():
    assert set(GATES) == set(SIGNALS)
    assert {
        name for formula in map(formula_of, MAPPINGS) for side in formula.sides for name, _ in side.divergences
    } == {
        *DIVERGENCES,
        SQUARES,
    }


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_papers_objectives_are_points_of_the_formula(name, temperature):
    """They keep closed forms of their own, which are faster."""
    z, w, labels = sample()
    keys = {**KEYS, "kd_temperature": temperature, "kd_gamma": 3.0 / temperature}
    own, generic = (
        distillation_loss(z, w, labels, **{**keys, "kd_loss": loss}) for loss in (name, expand(name, keys))
    )
    close(generic.loss, own.loss)
    close(generic.difficulty, own.difficulty)
    close(torch.autograd.grad(generic.loss.sum(), z)[0], torch.autograd.grad(own.loss.sum(), z)[0])


def heads(tokens=23, vocab=17, dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    trained = [normal(tokens, 6).requires_grad_(), normal(vocab, 6).requires_grad_()]
    trained += [normal(vocab).requires_grad_()] if bias else []
    return trained, (normal(tokens, 9), normal(vocab, 9)), torch.randint(vocab, (tokens,), generator=generator)


def fused(trained, teacher, labels, formula, **keywords):
    bias = trained[2] if len(trained) > 2 else None
    return fused_linear_distillation(
        *trained[:2], *teacher, labels, student_bias=bias, num_items=5, kd_loss=formula, **keywords
    )


@pytest.mark.parametrize("chunk_size", [4, 7, 100, None])
@pytest.mark.parametrize("name", [*PRESETS, *MAPPINGS])
def test_the_fused_path_equals_the_plain_one_for_every_chunk_size(name, chunk_size):
    trained, teacher, labels = heads()
    formula = formula_of(name)
    student = trained[0] @ trained[1].t() + trained[2]
    plain = distillation_loss(student, teacher[0] @ teacher[1].t(), labels, kd_loss=formula)
    output = fused(trained, teacher, labels, formula, chunk_size=chunk_size)
    close(output.loss, plain.loss.sum() / 5)
    for key in ("signal", "hard", "difficulty", "ce", "teacher_ce", "teacher_kl", "agreement"):
        close(getattr(output.statistics, key), getattr(plain.statistics, key))
    close(torch.autograd.grad(output.loss, trained), torch.autograd.grad(plain.loss.sum() / 5, trained))


@pytest.mark.parametrize("name", [*PRESETS, *MAPPINGS])
def test_where_looking_at_values_would_wait_for_the_device_the_result_is_the_same(name, monkeypatch):
    if formula_of(name).gate is None:
        pytest.skip("no gate")
    trained, teacher, labels = heads()
    expected = fused(trained, teacher, labels, formula_of(name), chunk_size=7)
    monkeypatch.setattr("llamafactory_sekd.objectives.losses.generic.may_look", lambda _: False)
    output = fused(trained, teacher, labels, formula_of(name), chunk_size=7)
    close(output.loss, expected.loss)
    close(torch.autograd.grad(output.loss, trained), torch.autograd.grad(expected.loss, trained))


EVERYTHING = {
    "target": "teacher",
    "gate": {"signal": "hellinger", "above": 0.6, "width": 0.2},
    "easy": {"divergence": {"kl": 1, "jsd": 1, "tvd": 1, "adaptive_kl": 1}, "skew": 0.8, "temperature": 1.5},
    "hard": {"divergence": {"reverse_kl": 1, "skew_reverse_kl": 1, "alpha_beta": 1, "hellinger": 1}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no_evolution", "jsd", "verified_reference", "entropy_gate", "everything"])
def test_compiled_code_gives_the_same(name, caplog, monkeypatch):
    monkeypatch.setitem(MAPPINGS, "everything", EVERYTHING)
    torch._dynamo.reset()
    compiling.compiled.cache_clear()  # or a failure would be that of the first one only
    trained, teacher, labels = heads()
    expected = fused(trained, teacher, labels, formula_of(name), chunk_size=7)
    output = fused(trained, teacher, labels, formula_of(name), chunk_size=7, compile=True)
    close(output.loss, expected.loss)
    close(torch.autograd.grad(output.loss, trained), torch.autograd.grad(expected.loss, trained))
    assert not [record for record in caplog.records if "torch.compile failed" in record.message]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*PRESETS, *MAPPINGS])
def test_low_precision_logits_are_computed_in_float32(name, dtype):
    z, w, labels = sample(dtype=dtype)
    output = distillation_loss(z, w, labels, kd_loss=formula_of(name))
    exact = distillation_loss(z.detach().double(), w.double(), labels, kd_loss=formula_of(name))
    assert output.loss.dtype == output.statistics.signal.dtype == torch.float32
    close(output.loss.double(), exact.loss, 2e-5)
    assert torch.autograd.grad(output.loss.sum(), z)[0].dtype == dtype


@pytest.mark.parametrize("name", [*PRESETS, *MAPPINGS])
def test_entries_masked_in_both_models_are_as_if_they_were_not_there(name):
    z, w, labels = sample()
    masked = torch.full((11, 2), -math.inf, dtype=torch.float64)
    padded = torch.cat([z.detach(), masked], 1).requires_grad_()
    output = distillation_loss(padded, torch.cat([w, masked], 1), labels, kd_loss=formula_of(name))
    expected = distillation_loss(z, w, labels, kd_loss=formula_of(name))
    close(output.loss, expected.loss)
    wide = torch.autograd.grad(output.loss.sum(), padded)[0]
    close(wide, torch.cat([torch.autograd.grad(expected.loss.sum(), z)[0], torch.zeros_like(masked)], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", [*PRESETS, *MAPPINGS])
def test_an_entry_that_one_model_excludes_gives_no_nan(name, side, dtype):
    z, w, labels = sample(dtype=dtype)
    other = ((labels + 1) % 7).unsqueeze(1)
    z = z.detach().scatter(1, other, -math.inf) if side == "student" else z.detach()
    w = w.scatter(1, other, -math.inf) if side == "teacher" else w
    z.requires_grad_()
    output = distillation_loss(z, w, labels, kd_loss=formula_of(name))
    assert not output.loss.isnan().any()
    gradient = torch.autograd.grad(output.loss.sum(), z)[0]
    assert not gradient.isnan().any()
    if name in ("mixed kl", "teacher kl") and side == "student":
        assert output.loss.isposinf().all()
        assert gradient.isfinite().all()
    if name in ("mixed reverse_kl", "teacher reverse_kl") and side == "teacher":
        assert output.loss.isposinf().all()
    if name.split()[-1] in ("jsd", "tvd", "skew_reverse_kl") or name.endswith(" hellinger"):
        assert output.loss.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", [*PRESETS, *MAPPINGS])
def test_logits_whose_probabilities_underflow_are_computed_as_in_float64(name):
    z, w, labels = sample(dtype=torch.float32)
    z = (z.detach() * 60).requires_grad_()
    if "student_entropy" in str(formula_of(name)):
        pytest.skip("most entropies are zero, and which are the largest is chance")
    output = distillation_loss(z, w, labels, kd_loss=formula_of(name))
    wide = z.detach().double().requires_grad_()
    exact = distillation_loss(wide, w.double(), labels, kd_loss=formula_of(name))
    close(output.loss.double(), exact.loss, 1e-4)
    close(torch.autograd.grad(output.loss.sum(), z)[0].double(), torch.autograd.grad(exact.loss.sum(), wide)[0], 1e-4)


@pytest.mark.parametrize("name", [*PRESETS, *MAPPINGS])
def test_no_tokens_give_a_loss_of_zero_with_a_gradient(name):
    trained, teacher, labels = heads(tokens=0)
    output = fused(trained, teacher, labels, formula_of(name))
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert not trained[1].grad.any()
    z, w, labels = sample(tokens=11)
    loss = distillation_loss(z[:0], w[:0], labels[:0], kd_loss=formula_of(name)).loss
    assert loss.shape == (0,)
    assert not torch.autograd.grad(loss.sum(), z)[0].any()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("name", [*PRESETS, *MAPPINGS])
def test_a_token_with_a_broken_teacher_loses_nothing_and_changes_nothing(name, broken):
    trained, (hidden, head), labels = heads(bias=False)
    formula = formula_of(name)
    if formula.gate is not None and formula.gate.share is not None:
        pytest.skip("the others' share is that of all tokens")
    bad = hidden.clone()
    bad[4] = broken
    output = fused(trained, (bad, head), labels, formula, chunk_size=5)
    others = [i for i in range(len(labels)) if i != 4]
    rest = fused([trained[0][others], trained[1]], (hidden[others], head), labels[others], formula, chunk_size=5)
    close(output.loss, rest.loss)
    assert output.statistics.teacher_ce[4].isnan()
    close(torch.autograd.grad(output.loss, trained), torch.autograd.grad(rest.loss, trained))


def test_a_divergence_alone_is_what_its_limits_say():
    z, w, labels = sample()
    w[7] /= 4  # near the limits the smallest probabilities have to be large

    def loss(**side):
        return distillation_loss(z, w, labels, kd_loss={"lambda": 1, **side}).loss

    kl, reverse = loss(divergence="kl"), loss(divergence="reverse_kl")
    close(loss(divergence="alpha_beta", alpha=1, beta=0), kl)
    close(loss(divergence="alpha_beta", alpha=0, beta=1), reverse)
    close(loss(divergence="alpha_beta", alpha=1, beta=1e-7), kl, 1e-5)
    close(loss(divergence="jsd", mix=1e-7) / 1e-7, reverse, 1e-5)
    close(loss(divergence="jsd", mix=1 - 1e-7) / 1e-7, kl, 1e-5)
    close(loss(divergence="skew_reverse_kl", mix=1e-9), reverse, 1e-6)
    close(loss(divergence="alpha_beta", alpha=0.5, beta=0.5), 4 * loss(divergence="hellinger"))


@pytest.mark.parametrize("name", ["adaptive_kl", "skewed adaptive_kl"])
def test_a_head_of_few_entries_needs_no_sorting_and_one_of_many_gets_it(name, monkeypatch):
    z, w, labels = sample()
    expected = distillation_loss(z, w, labels, kd_loss=formula_of(name)).loss
    monkeypatch.setattr("llamafactory_sekd.objectives.losses.elementwise.HEAD_GROWTH", 2)
    for entries in (1, 2, 4):
        monkeypatch.setattr("llamafactory_sekd.objectives.losses.elementwise.HEAD_ENTRIES", entries)
        close(distillation_loss(z, w, labels, kd_loss=formula_of(name)).loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head", [0.02, 0.5, 0.95])
def test_the_head_is_the_same_however_it_is_looked_for(head, dtype, monkeypatch):
    """Rounded logits, as half precision makes them: entries of equal size are all in the head or all outside."""
    generator = torch.Generator().manual_seed(3)
    t = (8 * torch.randn(12, 500, generator=generator)).round().div(4).to(dtype)
    t[0] = 0.0  # all are the largest
    t = t.softmax(-1)
    gaps = torch.rand(t.shape, generator=generator).to(dtype)
    expected = []
    for row, gap in zip(t.tolist(), gaps.tolist(), strict=True):
        fits = [x for x in sorted(set(row)) if sum(y for y in row if y >= x) <= head]
        smallest = min(fits, default=max(row))
        expected.append(sum(g for x, g in zip(row, gap, strict=True) if x >= smallest))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for entries in (4, 64, 500):
        monkeypatch.setattr(elementwise, "HEAD_ENTRIES", entries)
        close(elementwise._sum_over_head(gaps, t, head).double(), double(expected), tolerance)
    close(elementwise._sum_over_head_without_looking(gaps, t, head).double(), double(expected), tolerance)


@pytest.mark.parametrize("columns", [97, 500, 8192])
def test_the_largest_entries_are_those_of_topk(columns):
    t = torch.randperm(6 * columns, generator=torch.Generator().manual_seed(4)).view(6, columns).double()
    for entries in (1, 5, 64):
        expected, found = t.topk(entries), elementwise._largest(t, entries)
        assert torch.equal(found[0], expected.values)
        assert torch.equal(found[1], expected.indices)


# A side without weight.


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("name", ["entropy_gate", "acceptance_gate", "entropy turned around"])
def test_tokens_that_a_gate_leaves_out_are_in_no_product_of_the_backward_pass(name, cap, monkeypatch):
    turned = {
        "gate": {"signal": "student_entropy", "above": 2.0},
        "easy": {"divergence": "jsd"},
        "hard": {"weight": 0},
    }
    formula = formula_of(name) if name in PRESETS else parse(turned)
    trained, teacher, labels = heads()
    student = trained[0] @ trained[1].t() + trained[2]
    student = student if cap is None else cap * (student / cap).tanh()
    plain = distillation_loss(student, teacher[0] @ teacher[1].t(), labels, kd_loss=formula)
    rows = []
    product = head_products.hidden_gradient

    def counted(gradient, weight, *, out):
        rows.append(len(gradient))
        return product(gradient, weight, out=out)

    monkeypatch.setattr(head_products, "hidden_gradient", counted)
    output = fused(trained, teacher, labels, formula, chunk_size=23, student_transform=LogitTransform(cap=cap))
    close(output.loss, plain.loss.sum() / 5)
    close(torch.autograd.grad(output.loss, trained), torch.autograd.grad(plain.loss.sum() / 5, trained))
    left_out = plain.statistics.hard == (name == "entropy turned around")
    assert 0 < int(left_out.sum()) < len(labels)
    if name != "entropy_gate":  # which takes a few tokens again
        assert rows == [int((~left_out).sum())]
    assert rows[0] < len(labels)


def test_a_gate_by_the_running_mean_takes_it_from_the_caller():
    z, w, labels = sample()
    gate = {"signal": "teacher_probability", "below": "mean"}
    mean = distillation_loss(z, w, labels, kd_loss={"gate": gate, **SIDES}, kd_gamma=torch.tensor(0.2))
    number = distillation_loss(z, w, labels, kd_loss={"gate": {**gate, "below": 0.2}, **SIDES})
    close(mean.loss, number.loss)
    assert mean.hard.any()


@pytest.mark.parametrize("gate", [{"share": 0.3}, {"above": 0}, {"below": {"from": 0.5, "to": -1}}, {"above": "mean"}])
def test_cooling_needs_a_threshold_above_zero(gate):
    mapping = {"gate": {"signal": "hellinger", "cooling": 0.6, **gate}, "easy": {"divergence": "kl"}}
    if gate == {"above": "mean"}:
        assert parse(mapping).hard == parse(mapping).easy
        return
    with pytest.raises(ArgumentError, match=r"`kd_loss.gate.\w+: .*` cannot be used: .*(threshold|above 0)"):
        parse(mapping)


def test_a_preset_named_alone_moves_and_starts_from_its_own_signal():
    moved = DistillationArguments(kd_loss="taid").objective_keywords(lambda start, end: (start + end) / 2)
    assert moved["kd_loss"].easy.interpolation == pytest.approx(0.7)
    cooled = DistillationArguments(kd_loss="adaptive_temperature")
    assert cooled.follows_mean
    assert cooled.objective_keywords()["kd_gamma"] == 0.5
    assert DistillationArguments(kd_loss="jsd", kd_beta_end=0.9).objective_keywords()["kd_loss"] == "jsd"


# A user's function.


def test_a_derivative_of_the_users_own_takes_the_place_of_autograd():
    z, w, labels = sample()
    by_hand, by_autograd = (
        distillation_loss(z, w, labels, kd_loss={"divergence": f"user_functions:{name}"}).loss
        for name in ("squares_by_hand", "squares")
    )
    close(by_hand, by_autograd)
    close(torch.autograd.grad(by_hand.sum(), z)[0], torch.autograd.grad(by_autograd.sum(), z)[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user_functions:summed", r"`user_functions:summed` returned \[2\] for t and s of shape \[2, 5\]"),
        ("user_functions:without_gradient", "`user_functions:without_gradient` has no gradient"),
        ("user_functions:not_a_number", "`user_functions:not_a_number` is NaN"),
        ("user_functions:not_a_tensor", "`user_functions:not_a_tensor` returned float"),
        ("user_functions:raises", "`user_functions:raises` fails on two tensors"),
        ("user_functions:absent", "has no function `absent`"),
        ("no_such_module:f", "module `no_such_module` cannot be imported"),
    ],
)
def test_a_users_function_that_cannot_work_is_refused_in_one_line_with_its_name(name, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        try_user_function(name)
    assert "\n" not in str(caught.value)


def test_a_users_module_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_own_losses.py").write_text("def cubes(t, s):\n    return (t - s).abs() ** 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    z, w, labels = sample()
    loss = distillation_loss(z, w, labels, kd_loss={"divergence": "my_own_losses:cubes", "lambda": 1}).loss
    close(loss, (w.softmax(-1) - z.softmax(-1)).abs().pow(3).sum(-1))
