"""The benchmark of complete optimizer steps runs, on tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.forks import forked


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step.py"


@pytest.mark.slow
def test_steps_of_all_contenders_are_timed_and_written(tmp_path):
    out = tmp_path / "step.json"
    done = forked([sys.executable, str(SCRIPT), "--smoke", "--out", str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert {name: len(values) for name, values in result["seconds"].items()} == {
        "sft": 2,
        "self_evolution": 2,
        "teacher": 2,
    }
    assert all(memory["peak"] >= memory["imported"] > 0 for memory in result["memory"].values())
    assert "peak RSS without models" in done.stdout
