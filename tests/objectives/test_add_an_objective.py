"""The worked example of `docs/add_an_objective.md`: the code of the page, put where the page says, is an objective."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import naive_objectives
from helpers.runs import base_config, logged, train, weights

from llamafactory_sekd import arguments
from llamafactory_sekd.objectives import distillation_loss, fused_linear_distillation, losses
from llamafactory_sekd.objectives.losses import closed_forms, equations


NAME = "jensen_shannon"
PAGE = Path(__file__).parents[2] / "docs" / "add_an_objective.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def added(monkeypatch):
    """The objective stands in the package for the duration of a test."""
    equation, closed_form, entry, row = BLOCKS
    for module, code in ((equations, equation), (closed_forms, closed_form)):
        monkeypatch.setattr(module, NAME, None, raising=False)
        exec(code, vars(module))
    for registry, code, module in (
        (losses.OBJECTIVES, entry, losses),
        (arguments.KD_LOSSES, row, arguments),
    ):
        monkeypatch.setitem(registry, NAME, eval("{" + code + "}", dict(vars(module)))[NAME])


def naive_loss(z: Sequence[float], w: Sequence[float], label: int, kd_lambda: float, temperature: float) -> float:
    p, q = naive_objectives.softmax(w, temperature), naive_objectives.softmax(z, temperature)
    mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    divergence = (naive_objectives.kl(p, mean) + naive_objectives.kl(q, mean)) / 2
    ce = naive_objectives.kl([float(i == label) for i in range(len(z))], naive_objectives.softmax(z))
    return (1 - kd_lambda) * ce + kd_lambda * temperature**2 * divergence


def test_the_example_has_under_forty_lines():
    assert len("".join(BLOCKS).splitlines()) < 40


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_both_forms_of_the_example_equal_a_naive_reference(added, temperature):
    generator = torch.Generator().manual_seed(0)
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(rows, 4, generator=generator, dtype=torch.float64) for rows in (7, 5, 7, 5)
    )
    labels = torch.randint(5, (7,), generator=generator)
    keys = {"kd_loss": NAME, "kd_lambda": 0.4, "kd_temperature": temperature}

    z, w = (hidden @ head.t()).requires_grad_(), teacher_hidden @ teacher_head.t()
    plain = distillation_loss(z, w, labels, **keys).loss
    rows = list(zip(z.tolist(), w.tolist(), labels.tolist(), strict=True))
    expected = [naive_loss(a, b, y, 0.4, temperature) for a, b, y in rows]
    assert plain.tolist() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(plain.sum(), z)
    for row, (a, b, y) in zip(gradient.tolist(), rows, strict=True):
        slopes = naive_objectives.central_differences(
            lambda point, b=b, y=y: naive_loss(point, b, y, 0.4, temperature), a
        )
        assert row == pytest.approx(slopes, abs=1e-8)

    hidden.requires_grad_()
    fused = fused_linear_distillation(
        hidden, head, teacher_hidden, teacher_head, labels, num_items=7, chunk_size=3, **keys
    ).loss
    assert fused.item() == pytest.approx(sum(expected) / 7)
    torch.testing.assert_close(torch.autograd.grad(fused, hidden)[0], gradient @ head / 7)


def test_the_example_trains_alike_on_the_fused_and_on_the_plain_path(added, tiny_root, tmp_path, monkeypatch):
    from llamafactory_sekd.trainer import DistillationTrainer

    keys = {"kd_loss": NAME, "kd_lambda": 0.9, "max_steps": 3, "learning_rate": 5e-3}
    train(base_config(tiny_root, output_dir=str(tmp_path / "fused"), **keys))
    monkeypatch.setattr(DistillationTrainer, "_use_fused_path", lambda *_: False)
    train(base_config(tiny_root, output_dir=str(tmp_path / "plain"), **keys))
    losses_of = {path: logged(tmp_path / path, "loss") for path in ("fused", "plain")}
    assert losses_of["fused"][-1] < losses_of["fused"][0]
    assert losses_of["fused"] == pytest.approx(losses_of["plain"], abs=2e-4)
    plain = weights(tmp_path / "plain")
    for name, value in weights(tmp_path / "fused").items():
        # Adam turns the rounding of a gradient near zero into a visible part of its step of 5e-3.
        torch.testing.assert_close(value, plain[name], atol=2e-4, rtol=1e-5)
