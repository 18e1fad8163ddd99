"""The benchmark for accelerators runs on a CPU as well, and its correctness holds there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.runs import command

from llamafactory_sekd.presets import PRESETS


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accelerator.py"


def test_every_preset_agrees_with_float64_in_every_type_and_the_tables_are_printed(tmp_path: Path) -> None:
    out = tmp_path / "accelerator.json"
    # Without the environment's packages but torch: the machine with the accelerator has nothing else.
    blocked = "import sys; sys.modules.update(dict.fromkeys(('llamafactory', 'transformers', 'rich', 'psutil')));"
    start = f"import runpy; sys.argv = ['x', '--smoke', '--device', 'cpu', '--out', {str(out)!r}];"
    done = command([sys.executable, "-c", f"{blocked} {start} runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"])
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert {row["preset"] for row in result["correctness"]} == set(PRESETS)
    assert {row["dtype"] for row in result["correctness"]} == {"float32", "bfloat16", "float16"}
    assert "| 300 | ours, self_evolution |" in done.stdout
    assert "| 300 | 64 |" in done.stdout


def test_bytes_moved_are_those_of_the_heads_once_per_chunk_and_the_logits_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from support.heads import bytes_moved, products_seconds

    once = bytes_moved(4096, 4096, 128_256, (4096, 4096))
    assert bytes_moved(8192, 4096, 128_256, (4096, 4096)) == 2 * once
    heads = 128_256 * 2 * 3 * 4096 + 2 * 128_256 * 4 * 4096
    assert bytes_moved(4096, 1024, 128_256, (4096, 4096)) == once + 3 * heads
    assert products_seconds(8192, 128_256, (4096, 4096)) == pytest.approx(0.0473, rel=1e-2)
