"""A micro-batch of the trainer on an accelerator: no mixed devices, only the waits that docs/performance.md lists."""

from __future__ import annotations

from copy import copy
from unittest.mock import patch

import pytest
import torch
from helpers.fake_cuda import DEVICE, Waits, moved
from helpers.runs import base_config, train
from torch._subclasses.fake_tensor import FakeTensorMode

from llamafactory_sekd.presets import PRESETS
from llamafactory_sekd.trainer import DistillationTrainer
from llamafactory_sekd.trainer.adaptive import AdaptiveKeys
from llamafactory_sekd.trainer.token_difficulty import TokenSums


# The rows that predict a response token are taken by a mask: of the labels, and of either model's hidden states.
ALWAYS = {"loss_module.response_positions": 1, "lm_head.selected": 2}
MAPPING = {
    "target": "teacher",
    "gate": {"signal": "teacher_probability", "below": "mean"},
    "easy": {"divergence": "reverse_kl", "weight": {"from": 0.5, "to": 1.0}},
    "hard": {"divergence": "jsd", "mix": 0.3, "temperature": 2.0, "lambda": 0.9},
}
OBJECTIVES = {
    **{name: {"kd_loss": name} for name in PRESETS},
    "self_evolution_topk": {"kd_loss": "self_evolution_topk", "kd_topk": 0.5},
    "both follow the training": {"kd_gamma": "auto", "kd_hard_scale": "balanced"},
    "mapping": {"kd_loss": MAPPING},
    "a user's function": {"kd_loss": {"divergence": "helpers.user_functions:squares_by_hand"}},
}


@pytest.fixture(scope="module")
def trainer(tiny_root, tmp_path_factory) -> DistillationTrainer:
    """The trainer of a run of one step, its models then moved to the accelerator."""
    seen = []
    original = DistillationTrainer.train

    def remember(self, *args, **kwargs):
        seen.append(self)
        return original(self, *args, **kwargs)

    with patch.object(DistillationTrainer, "train", remember):
        train(base_config(tiny_root, output_dir=str(tmp_path_factory.mktemp("step")), max_steps=1))
    return seen[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_micro_batch_waits_for_the_device_where_the_documentation_says(trainer, objective):
    changed = copy(trainer)
    changed.distillation = copy(trainer.distillation)
    for key, value in {"kd_loss": "self_evolution", "kd_hard_scale": "none", **OBJECTIVES[objective]}.items():
        setattr(changed.distillation, key, value)
    changed.formula = changed.distillation.formula()
    with FakeTensorMode(), Waits() as waits:
        changed.adaptive = AdaptiveKeys(changed.distillation, DEVICE)
        changed.token_sums = TokenSums(384, DEVICE)
        changed.train_means = changed._new_means()
        model = moved(trainer.model)
        moved(trainer.teacher.model)
        batch = {name: torch.zeros(4, 24, dtype=torch.int64, device=DEVICE) for name in ("input_ids", "labels")}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        loss = changed.compute_loss(model.train(), batch, num_items_in_batch=torch.ones((), device=DEVICE))
        assert loss.device.type == "cuda"
        assert changed.train_means.sums.device.type == "cuda"
    by_share = changed.formula.gate is not None and changed.formula.gate.share is not None
    assert dict(waits.places) == ALWAYS | ({"sweep._correct": 1} if by_share else {})
