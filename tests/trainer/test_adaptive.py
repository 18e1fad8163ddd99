"""Γ and the hard tokens' factor follow the training: equal to a simulation by hand, and the same however it is cut."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import base_config, logged, train
from torch.utils._python_dispatch import TorchDispatchMode

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.objectives import TokenStatistics
from llamafactory_sekd.trainer.adaptive import AdaptiveKeys
from llamafactory_sekd.trainer.metrics import TokenMeans


ONE_RANK = SimpleNamespace(reduce=lambda sums, reduction: sums)
FOLLOWED = {"kd_gamma": "auto", "kd_hard_scale": "balanced"}


def adaptive(**keys: Any) -> AdaptiveKeys:
    return AdaptiveKeys(DistillationArguments(**keys), torch.device("cpu"))


def statistics(
    difficulty: list[float], easy: list[float], hard: list[float], left_out: tuple[int, ...] = ()
) -> TokenStatistics:
    columns = {name: torch.tensor(values) for name, values in (("d", difficulty), ("e", easy), ("h", hard))}
    zeros = torch.zeros(len(difficulty))
    teacher_ce = zeros.clone()
    teacher_ce[list(left_out)] = math.nan
    return TokenStatistics(columns["d"], zeros, zeros, zeros, teacher_ce, zeros, columns["e"], columns["h"])


def values(keys: AdaptiveKeys) -> dict[str, float]:
    return {name: value.item() for name, value in keys.keywords().items()}


def test_the_values_are_ratios_of_sums_over_the_steps_before_and_steps_count_less_with_age():
    keys = adaptive(**FOLLOWED)
    assert values(keys) == {"kd_gamma": 0.4, "kd_hard_scale": 1.0}
    steps = [([1.0, 3.0, 0.5], [0, 0.8, 0], [0, 0.1, 0]), ([2.0], [0.5], [0.25]), ([0.25, 0.75], [0, 0], [0, 0])]
    sums = [0.0] * 4
    for difficulty, easy, hard in steps:
        used = values(keys)
        for index in range(len(difficulty)):  # in micro-batches of one token, during which nothing moves
            keys.add(statistics(difficulty[index : index + 1], easy[index : index + 1], hard[index : index + 1]))
            assert values(keys) == used
        keys.advance(ONE_RANK)
        added = [sum(difficulty), len(difficulty), sum(easy), sum(hard)]
        sums = [0.9 * old + new for old, new in zip(sums, added, strict=True)]
        assert values(keys) == pytest.approx({"kd_gamma": sums[0] / sums[1], "kd_hard_scale": sums[2] / sums[3]})
        assert keys.logs() == pytest.approx({name.replace("kd_", "kd/"): value for name, value in used.items()})


def test_broken_and_infinite_tokens_do_not_count():
    keys, clean = adaptive(**FOLLOWED), adaptive(**FOLLOWED)
    keys.add(statistics([1.0, math.nan, math.inf, 2.0], [0.5, math.nan, 0.0, 0.5], [0.1, math.nan, 0.0, 0.1], (1,)))
    clean.add(statistics([1.0, 2.0], [0.5, 0.5], [0.1, 0.1]))
    for each in (keys, clean):
        each.advance(ONE_RANK)
    assert values(keys) == values(clean)


def test_without_tokens_or_hard_tokens_the_start_stays_and_vanishing_gradients_are_bounded():
    keys = adaptive(**FOLLOWED)
    keys.advance(ONE_RANK)
    keys.add(statistics([], [], []))
    keys.advance(ONE_RANK)
    assert values(keys) == {"kd_gamma": 0.4, "kd_hard_scale": 1.0}
    keys.add(statistics([0.2], [0.0], [0.0]))
    keys.advance(ONE_RANK)
    assert values(keys) == {"kd_gamma": pytest.approx(0.2), "kd_hard_scale": 1.0}
    keys.add(statistics([9.0], [1.0], [1e-9]))
    keys.advance(ONE_RANK)
    assert values(keys)["kd_hard_scale"] == 100.0


class NothingIsReadBack(TorchDispatchMode):
    """On an accelerator a number that is read back is a wait for the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back_from_the_device():
    keys, tokens = adaptive(**FOLLOWED), statistics([1.0, 0.3], [0.7, 0.0], [0.1, 0.0])
    with NothingIsReadBack():
        for _ in range(2):
            keys.keywords()
            keys.add(tokens)
            keys.advance(ONE_RANK)


@pytest.mark.parametrize("followed", [{}, {"kd_gamma": "auto"}, {"kd_hard_scale": "balanced"}, FOLLOWED])
def test_only_what_is_asked_for_is_followed_and_goes_through_a_checkpoint(followed):
    keys, resumed = adaptive(**followed), adaptive(**followed)
    keys.add(statistics([1.0, 0.3], [0.7, 0.0], [0.1, 0.0]))
    keys.advance(ONE_RANK)
    assert set(keys.keywords()) == set(followed)
    assert len(keys.logs()) == len(followed)
    resumed.restore(json.loads(json.dumps(keys.state())), ONE_RANK)
    assert values(resumed) == values(keys)
    resumed.restore({}, ONE_RANK)  # of a checkpoint that was trained without
    assert values(resumed) == values(adaptive(**followed))


def test_a_training_selects_and_scales_by_the_simulated_values_and_evaluates_with_the_latest(
    tiny_root, tmp_path, monkeypatch
):
    seen: list[TokenStatistics] = []
    add = TokenMeans.add

    def record(self: TokenMeans, tokens: TokenStatistics, *rest: torch.Tensor) -> None:
        seen.append(tokens)
        add(self, tokens, *rest)

    monkeypatch.setattr(TokenMeans, "add", record)
    config = base_config(
        tiny_root,
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        eval_dataset="tiny_valid",
        eval_strategy="steps",
        eval_steps=4,
        **FOLLOWED,
    )
    train(config)
    sums, gammas, scales = [0.0, 0.0, 0.0, 0.0], [0.4], [1.0]
    for step in range(4):
        sums = [0.9 * value for value in sums]
        for tokens in seen[2 * step : 2 * step + 2]:
            d = tokens.difficulty.tolist()
            assert tokens.hard.tolist() == [float(value > gammas[-1]) for value in d]
            assert tokens.easy_norm.count_nonzero() == tokens.hard.sum()
            added = (sum(d), len(d), tokens.easy_norm.sum().item(), tokens.hard_norm.sum().item())
            sums = [old + new for old, new in zip(sums, added, strict=True)]
        gammas.append(sums[0] / sums[1])
        scales.append(sums[2] / sums[3])

    assert logged(tmp_path / "out", "kd/gamma") == pytest.approx(gammas[:4], abs=2e-6)
    assert logged(tmp_path / "out", "kd/hard_scale") == pytest.approx(scales[:4], rel=1e-5)
    assert len({round(gamma, 3) for gamma in gammas}) == 5
    assert scales[-1] > 1
    evaluated = [tokens for tokens in seen[8:] if tokens.easy_norm is None]
    assert evaluated
    assert evaluated == seen[8:]
    for tokens in evaluated:
        assert tokens.hard.tolist() == [float(value > gammas[-1]) for value in tokens.difficulty.tolist()]
