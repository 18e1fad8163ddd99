"""A run that learns nothing says so."""

from __future__ import annotations

import pytest
from helpers.runs import base_config, train

from llamafactory_sekd.errors import ArgumentError


def run(root, out, **keys):
    return train(base_config(root, output_dir=str(out), **keys))


def test_a_gradient_of_exactly_zero_is_told(tiny_root, tmp_path, said):
    run(tiny_root, tmp_path, kd_loss="skew", kd_beta=1e-60, max_steps=2)  # the proxy is the target
    assert "is exactly zero: the student learns nothing" in said.text


def test_a_loss_that_is_not_finite_is_told(tiny_root, tmp_path, said):
    run(tiny_root, tmp_path, kd_loss="forward_kl", learning_rate=1e30, max_steps=3)
    assert "is not finite: the weights no longer improve" in said.text


@pytest.mark.parametrize(("gamma", "words"), [(-1.0, "More than 98%"), (1e9, "Less than 2%")])
def test_a_share_of_hard_tokens_that_says_nothing_is_told(tiny_root, tmp_path, said, gamma, words):
    run(tiny_root, tmp_path, kd_gamma=gamma, max_steps=3)
    assert words in said.text
    assert "docs/choose.md" in said.text.replace("\n", " ")


def test_a_healthy_run_is_not_warned_of(tiny_root, tmp_path, said):
    run(tiny_root, tmp_path, kd_loss="forward_kl", max_steps=4)
    assert "learns nothing" not in said.text
    assert "finite" not in said.text


@pytest.mark.parametrize(
    "keys",
    [
        {"kd_beta": 0.0},
        {"kd_loss": "skew", "kd_beta": 0.0, "kd_beta_end": 0.0},
        {"kd_temperature": 1e-8},
        {"kd_temperature": 1e30},
    ],
)
def test_keys_with_which_nothing_can_be_learned_are_refused(tiny_root, tmp_path, keys):
    with pytest.raises(ArgumentError, match=r"`kd_(beta|temperature)"):
        run(tiny_root, tmp_path, **keys)
