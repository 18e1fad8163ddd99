"""Curves are means over seeds, differences are taken seed by seed, and labels keep apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamafactory_sekd.study.report.cells import Group, short_names
from llamafactory_sekd.study.report.training_sections import POINTS, Histories


def cell(folder: Path, name: str, log: list[dict[str, float]], stage: str = "sekd") -> dict[str, Any]:
    (folder / f"{name}.json").write_text(json.dumps({"log_history": log}))
    return {"history": f"{name}.json", "config": {"stage": stage}}


def test_a_curve_is_the_mean_over_seeds_at_the_steps_that_all_have(tmp_path: Path) -> None:
    logs = {1: [(10, 2.0), (20, 1.0), (30, 0.0)], 2: [(10, 4.0), (20, 2.0)]}
    group = Group(
        "a",
        (),
        {seed: cell(tmp_path, f"a{seed}", [{"step": s, "loss": v} for s, v in log]) for seed, log in logs.items()},
    )
    curve = Histories(tmp_path).curve(group, "loss")
    assert curve is not None
    assert curve.steps == (10, 20)
    assert [one.mean for one in curve.summaries] == [3.0, 1.5]
    assert curve.summaries[0].sd == pytest.approx(2**0.5)
    assert Histories(tmp_path).curve(group, "kd/difficulty") is None


def test_a_difference_is_taken_seed_by_seed(tmp_path: Path) -> None:
    def group(name: str, values: dict[int, float]) -> Group:
        cells = {seed: cell(tmp_path, f"{name}{seed}", [{"step": 5, "loss": v}]) for seed, v in values.items()}
        return Group(name, (), cells)

    curve = Histories(tmp_path).curve(group("a", {1: 1.0, 2: 5.0, 3: 9.0}), "loss", group("b", {2: 4.0, 1: 0.0}))
    assert curve is not None
    assert (curve.summaries[0].mean, curve.summaries[0].sd, curve.summaries[0].count) == (1.0, 0.0, 2)


def test_the_hosts_sft_has_its_loss_for_its_nll_and_a_distillation_has_not(tmp_path: Path) -> None:
    log = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}]
    sft = Group("sft", (), {1: cell(tmp_path, "sft", log, stage="sft")})
    skew = Group("skew", (), {1: cell(tmp_path, "skew", log)})
    histories = Histories(tmp_path)
    for metric, value in (("kd/ce", 2.0), ("eval_kd/ce", 3.0)):
        curve = histories.curve(sft, metric)
        assert curve is not None
        assert curve.summaries[0].mean == value
        assert histories.curve(skew, metric) is None


def test_a_long_log_is_averaged_in_windows(tmp_path: Path) -> None:
    log = [{"step": step, "loss": float(step)} for step in range(1, 4 * POINTS + 1)]
    curve = Histories(tmp_path).curve(Group("a", (), {1: cell(tmp_path, "a", log)}), "loss")
    assert curve is not None
    assert len(curve.steps) == POINTS
    assert curve.steps[0] == curve.summaries[0].mean == 2.5


def test_a_torn_or_missing_log_has_no_curve(tmp_path: Path) -> None:
    torn = cell(tmp_path, "torn", [])
    (tmp_path / "torn.json").write_text('{"log_hist')
    group = Group("a", (), {1: torn, 2: {"history": "nowhere.json", "config": {}}, 3: {"history": None}})
    assert Histories(tmp_path).curve(group, "loss") is None


def test_short_names_say_what_tells_groups_apart() -> None:
    def group(system: str, **point: Any) -> Group:
        return Group(system, tuple(point.items()), {})

    own_best = [group("SFT", learning_rate=0.001), group("SKEW KD", learning_rate=0.0005)]
    assert list(short_names(own_best).values()) == ["SFT", "SKEW KD"]
    points = [group("SKEW KD", kd_beta=0.1, learning_rate=0.001), group("SKEW KD", kd_beta=0.5, learning_rate=0.001)]
    assert list(short_names(points).values()) == ["β = 0.1", "β = 0.5"]
    both = [*points, group("SFT", learning_rate=0.001)]
    assert list(short_names(both).values()) == ["SKEW KD, β = 0.1", "SKEW KD, β = 0.5", "SFT"]
