"""The benchmark of the offline teacher runs, on tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.runs import command


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cache.py"


@pytest.mark.slow
def test_the_cache_is_measured_and_its_losses_are_the_teachers(tmp_path: Path) -> None:
    out = tmp_path / "cache.json"
    done = command([sys.executable, str(SCRIPT), "--smoke", "--out", str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert {name: len(times) for name, times in result["seconds"].items()} == {"sft": 2, "hidden": 2, "two caches": 2}
    assert 0 <= result["largest deviation of a loss over 50 steps"] < 1e-6
    assert result["reading"]["hidden"]["growth in bytes"] < 2**20
    assert "Bytes per response token" in done.stdout
