"""The benchmark of the objective runs, on tiny heads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from helpers.forks import forked


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "objective.py"
CONTENDERS = {"ours, self_evolution", "naive autograd, self_evolution", "the four products"}


def test_the_objective_is_measured_against_its_contenders_and_agrees_with_float64(tmp_path: Path) -> None:
    out = tmp_path / "objective.json"
    done = forked([sys.executable, str(SCRIPT), "--smoke", "--out", str(out), "--threads", "1"])
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    (run,) = result["runs"]
    assert set(run["seconds"]) == set(run["memory"]) == CONTENDERS
    assert all(len(times) == 1 for times in run["seconds"].values())
    assert max(max(errors) for errors in run["agreement"].values()) < 1e-5
    assert "Growth with tokens" in done.stdout
