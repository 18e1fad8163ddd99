"""The doctor's estimate of three runs is within a quarter of the memory that they take."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.forks import forked


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "doctor.py"


@pytest.mark.slow
def test_estimated_and_measured_memory_agree_within_a_quarter(tmp_path):
    out = tmp_path / "doctor.json"
    done = forked([sys.executable, str(SCRIPT), "--smoke", "--out", str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert len(result) == 3
    for label, sizes in result.items():
        assert sizes["measured"] > 300 * 2**20, label  # so much that the libraries' own do not decide
        assert 0.75 <= sizes["estimated"] / sizes["measured"] <= 1.25, (label, sizes)
