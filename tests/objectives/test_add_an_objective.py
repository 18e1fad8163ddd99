"""The worked example of `docs/add_an_objective.md`: the file and the line of the page train, as written."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.naive_objectives import softmax, target
from helpers.runs import base_config, logged, train

from llamafactory_sekd.objectives import distillation_loss


PAGE = (Path(__file__).parents[2] / "docs" / "add_an_objective.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
(LINE,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The user's file is in the working directory."""
    (tmp_path / "my_losses.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return yaml.safe_load(LINE)


def test_the_example_has_under_ten_lines():
    assert len((CODE + LINE).splitlines()) < 10


def test_the_example_equals_a_naive_reference(added):
    generator = torch.Generator().manual_seed(0)
    z, w = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(5, (7,), generator=generator)
    loss = distillation_loss(z, w, labels, **added, kd_lambda=0.4).loss
    for value, a, b, label in zip(loss.tolist(), z.tolist(), w.tolist(), labels.tolist(), strict=True):
        goal = target(softmax(b), label, 0.4)
        assert value == pytest.approx(sum((t - s) ** 2 / (t + s) for t, s in zip(goal, softmax(a), strict=True)))


def test_the_example_trains_alike_on_the_fused_and_on_the_plain_path(added, tiny_root, tmp_path, monkeypatch):
    from llamafactory_sekd.trainer import DistillationTrainer

    keys = {**added, "max_steps": 4, "learning_rate": 5e-3}
    train(base_config(tiny_root, output_dir=str(tmp_path / "fused"), **keys))
    monkeypatch.setattr(DistillationTrainer, "_use_fused_path", lambda *_: False)
    train(base_config(tiny_root, output_dir=str(tmp_path / "plain"), **keys))
    fused, plain = (logged(tmp_path / path, "loss") for path in ("fused", "plain"))
    assert fused[-1] < fused[0]
    assert fused == pytest.approx(plain, abs=2e-4)
