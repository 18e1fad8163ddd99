"""On an accelerator no preset mixes devices or waits for it, but where a gate's share has to be counted."""

from __future__ import annotations

import pytest
import torch
from helpers.fake_cuda import DEVICE, Waits
from torch._subclasses.fake_tensor import FakeTensorMode

from llamafactory_sekd.objectives import LogitTransform, fused_linear_distillation
from llamafactory_sekd.presets import PRESETS


SHARES = ("self_evolution_topk", "entropy_gate")
MAPPING = {
    "target": "teacher",
    "gate": {"signal": "hellinger", "above": 0.5, "width": 0.1},
    "easy": {"divergence": {"kl": 0.5, "hellinger": 0.5}, "temperature": 2},
    "hard": {"divergence": "alpha_beta", "skew": 0.7},
}
OBJECTIVES = {
    **{name: {"kd_loss": name} for name in PRESETS},
    "self_evolution_topk": {"kd_loss": "self_evolution_topk", "kd_topk": 0.5},
    "hard scale": {"kd_loss": "self_evolution", "kd_hard_scale": 2.0},
    "temperature": {"kd_loss": "skew_teacher", "kd_temperature": 2.0},
    "mapping": {"kd_loss": MAPPING},
    "a user's function": {"kd_loss": {"divergence": "helpers.user_functions:squares_by_hand"}},
}
# Whose backward pass would need a driver.
BY_AUTOGRAD = {"kd_loss": {"divergence": "helpers.user_functions:squares"}}


def waits_of(dtype: torch.dtype, transform: LogitTransform, **keys) -> dict[str, int]:
    with FakeTensorMode(), Waits() as waits:
        hidden, head, teacher_hidden, teacher_head = (
            torch.empty(*shape, dtype=dtype, device=DEVICE) for shape in ((40, 8), (64, 8), (40, 12), (64, 12))
        )
        output = fused_linear_distillation(
            hidden.requires_grad_(),
            head.requires_grad_(),
            teacher_hidden,
            teacher_head,
            torch.zeros(40, dtype=torch.int64, device=DEVICE),
            num_items=torch.ones((), dtype=torch.int64, device=DEVICE),
            chunk_size=16,
            student_bias=torch.empty(64, dtype=dtype, device=DEVICE, requires_grad=True),
            student_transform=transform,
            teacher_transform=transform,
            **keys,
        )
        assert output.loss.device.type == "cuda"
        assert output.statistics.hard.device.type == "cuda"
    return dict(waits.places)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_fused_objective_waits_for_the_device_only_to_count_a_share(objective):
    expected = {"sweep._correct": 1} if objective in SHARES else {}
    for dtype, transform in ((torch.float32, LogitTransform()), (torch.bfloat16, LogitTransform(0.5, 30.0))):
        assert waits_of(dtype, transform, **OBJECTIVES[objective]) == expected


@torch.no_grad()
def test_neither_does_a_users_function_without_a_derivative_in_evaluation():
    assert waits_of(torch.float32, LogitTransform(), **BY_AUTOGRAD) == {}
