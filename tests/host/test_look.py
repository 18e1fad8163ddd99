"""``sekd doctor --look``: how hard the first examples are, which references the teacher doubts, and what follows."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from helpers.forks import forked
from helpers.runs import base_config, write_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.host.corpus import HARDLY_ANY_HARD, MANY_DOUBTED, NEARLY_ALL_HARD, Sample, advice, look, report
from llamafactory_sekd.objectives import distillation_loss
from llamafactory_sekd.teacher.doubts import Verdict


def naive_difficulties(root, example_ids, first):
    """Equation 5 of one example's response, from both models' logits."""
    models = [AutoModelForCausalLM.from_pretrained(root / name) for name in ("student", "teacher")]
    ids = torch.tensor([example_ids])
    with torch.no_grad():
        student, teacher = (model(ids).logits[0, first - 1 : -1] for model in models)
    output = distillation_loss(student, teacher, ids[0, first:], kd_lambda=0.25)
    return output.difficulty.numpy(), output.statistics.teacher_ce.numpy()


def test_the_figures_are_those_of_the_first_examples(tiny_root):
    sample = look(base_config(tiny_root, output_dir="unused", kd_lambda=0.25, kd_gamma=2.0), 3)
    assert len(sample.verdicts) == len(sample.texts) == 3
    assert sample.texts[0] == ("The house is near the dog.", "Haus steht bei Hund.")
    tokenizer = AutoTokenizer.from_pretrained(tiny_root / "student")
    response = [*tokenizer.encode(sample.texts[0][1], add_special_tokens=False), tokenizer.eos_token_id]
    from llamafactory_sekd.data.prompts import prompt
    from llamafactory_sekd.demo.data import DIRECTION

    before = [1 - 1, *tokenizer.encode(prompt(sample.texts[0][0], DIRECTION), add_special_tokens=False)]
    difficulty, surprise = naive_difficulties(tiny_root, before + response, len(before))
    np.testing.assert_allclose(sample.verdicts[0].difficulty, difficulty, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(sample.verdicts[0].surprise, surprise, rtol=1e-3, atol=1e-4)


def test_shares_count_tokens_and_references():
    verdicts = [
        Verdict(-np.log([0.5, 0.9]), np.array([0.1, 3.0])),
        Verdict(-np.log([1e-4, 1e-4, 0.05, 0.05]), np.array([5.0, 5.0, 0.3, 0.2])),
    ]
    sample = Sample(verdicts, [("a", "b"), ("c", "d")], gamma=0.4)
    assert (sample.hard, sample.doubted, sample.doubted_tokens) == (0.5, 0.5, pytest.approx(4 / 6))
    lines = list(report(sample))
    assert lines[0].startswith("Start: 50% of the tokens are hard (d > 0.4); the teacher doubts 50% of 2 references")
    assert lines[3].endswith("c  →  d")  # the most doubted comes first


def test_each_advice_has_its_place():
    assert "lower `kd_gamma`" in advice(HARDLY_ANY_HARD / 2, 0.5)
    assert "`kd_lambda: 1` first" in advice(0.8, MANY_DOUBTED)
    assert "not ready" in advice((1 + NEARLY_ALL_HARD) / 2, MANY_DOUBTED / 2)
    assert "references look right" in advice(0.6, MANY_DOUBTED / 2)


def test_a_teacher_that_is_the_students_own_base_is_refused(tiny_root):
    with pytest.raises(ArgumentError, match=r"^`teacher_model: self` does not work with `--look`: "):
        look(base_config(tiny_root, output_dir="unused", teacher_model="self"), 3)


def test_the_doctor_looks_only_where_it_is_asked_to(tiny_root, tmp_path):
    path = write_yaml(tmp_path / "run.yaml", base_config(tiny_root, output_dir=str(tmp_path / "out")))
    done = forked(["sekd", "doctor", str(path), "--look", "4"])
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Start: \d+% of the tokens are hard .* of 4 references", done.stdout, re.MULTILINE)
    assert "Advice: " in done.stdout
    assert "label_ids" not in done.stdout  # the host prints its first example
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
