"""The block at the start of a run says what is trained, by whom, on what objective."""

from __future__ import annotations

import pytest
import torch  # noqa: F401  (registers the plug-in, as in every process of the host)
from helpers.runs import base_config, train


SELF = {"teacher_model": "self", "finetuning_type": "lora", "lora_target": "q_proj"}


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        (
            {"kd_beta": 0.25, "kd_beta_end": 1.0, "kd_chunk_size": 7},
            [
                "objective  self_evolution: KL(y~ ‖ q^) where d > Γ, else KL(y~ ‖ q), equations 7 and 8",
                "λ 0.5, β 0.25 to 1.0, Γ 0.4, hard scale none, T 1.0",
                "teacher, 99,408 parameters, placed as the student is",
                "student, trains 43,168 of 43,168 parameters (100.00%)",
                "7 response tokens at a time",
            ],
        ),
        (
            {"kd_loss": "forward_kl", "teacher_model_device": "cpu", "finetuning_type": "lora", "lora_rank": 2},
            ["objective  forward_kl: (1-λ)(-log q_y) + λ KL(p ‖ q)", "λ 0.5, T 1.0", "99,408 parameters, on cpu"],
        ),
        (SELF, ["student, the student's own base, loaded once"]),
    ],
    ids=["full", "on a device of its own", "self"],
)
def test_the_start_of_a_run_says_what_is_trained(tiny_root, tmp_path, capsys, keys, lines):
    train(base_config(tiny_root, output_dir=str(tmp_path), max_steps=1, **keys))
    printed = capsys.readouterr().out
    assert printed.count("Knowledge distillation (`stage: sekd`)") == 1
    for line in lines:
        assert line in printed
