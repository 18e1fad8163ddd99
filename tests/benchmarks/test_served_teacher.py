"""The benchmark of the served teacher runs, on tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.runs import command


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "served_teacher.py"


@pytest.mark.slow
def test_building_and_steps_are_measured_both_ways(tmp_path: Path) -> None:
    out = tmp_path / "served.json"
    done = command([sys.executable, str(SCRIPT), "--smoke", "--out", str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    for times in (result["building"], result["seconds"]):
        assert {name: len(values) for name, values in times.items()} == {"local": 1, "served": 1}
        assert all(value > 0 for values in times.values() for value in values)
    assert "Bytes per response token" in done.stdout
