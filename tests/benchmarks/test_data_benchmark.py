"""The benchmark of `sekd data pairs` runs, and memory does not grow with the corpus."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from helpers.runs import command


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data.py"


def test_memory_is_the_same_at_four_times_the_size(tmp_path: Path) -> None:
    done = command([sys.executable, str(SCRIPT), "--pairs", "50000", "200000", "--folder", str(tmp_path)])
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r"\|\s+([\d,]+) \| (.+?)\s+\|.*\|\s+(\d+) MB \|", done.stdout)
    assert len(rows) == 4
    small, large = (
        {variant: int(peak) for count, variant, peak in rows if count == size} for size in ("50,000", "200,000")
    )
    for variant, peak in large.items():
        assert peak < 200
        assert peak < small[variant] + 15, variant  # the text alone would take 60 MB more
