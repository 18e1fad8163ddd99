"""The benchmark of two checkouts times each one's own code, and finds that a copy computes the same."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from helpers.runs import command

from llamafactory_sekd.objectives import OBJECTIVES


ROOT = Path(__file__).parents[2]
SIZES = ("--vocab", "300", "--tokens", "32", "--widths", "8", "16", "--rounds", "1")


def test_a_copy_has_the_same_losses_and_one_that_was_changed_has_not(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(ROOT / "llamafactory_sekd", tmp_path / "copy" / "llamafactory_sekd")).parent
    run = [sys.executable, str(ROOT / "benchmarks" / "versions.py"), str(copy), *SIZES]
    done = command(run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the same loss") == len(OBJECTIVES)
    path = copy / "llamafactory_sekd" / "objectives" / "fused.py"
    path.write_text(path.read_text().replace("values[-1].sum() / plan.num_items", "values[-1].sum() / 7"))
    assert "the same loss" not in command(run).stdout
