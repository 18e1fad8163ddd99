"""Memory and open files over a long training: 2,000 steps of a tiny student under the stage, and under the host's SFT.

    python benchmarks/soak.py [--steps 2000]

Each in a process of its own. Prints and writes to benchmarks/results/soak.md the resident set, the open files, the
speed, and the slope of the resident set over the second half: the median over all pairs of samples, since an allocator
grows in jumps. The trainer keeps its log in memory, so SFT grows as well; exits with status 1 where the stage grows by
over 1 KiB per step more than SFT, or where its open files grow.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import torch  # registers the plug-in  # noqa: F401
from llamafactory.train import tuner
from transformers import TrainerCallback


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers import tiny  # noqa: E402
from helpers.runs import base_config  # noqa: E402

from llamafactory_sekd.files import write_atomic  # noqa: E402


LIMIT = 1024.0  # bytes per step


class Row(NamedTuple):
    """A sample: bytes, a number of files, steps per second since the last one."""

    step: int
    memory: int
    files: int
    speed: float


class Meter(TrainerCallback):
    """Samples this process every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.process = psutil.Process()
        self.rows: list[Row] = []
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            elapsed, self.start = time.perf_counter() - self.start, time.perf_counter()
            memory = self.process.memory_info().rss
            self.rows.append(Row(state.global_step, memory, self.process.num_fds(), self.every / elapsed))


def slope(rows: list[Row]) -> float:
    """Median slope of the resident set over all pairs of samples (Theil-Sen), in bytes per step."""
    pairs = combinations(rows, 2)
    return median((later.memory - earlier.memory) / (later.step - earlier.step) for earlier, later in pairs)


def train(stage: str, steps: int) -> list[Row]:
    """Train with checkpoints and evaluation on the way; forty rows."""
    meter = Meter(every=max(1, steps // 40))
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        tiny.save_llama(root / "teacher", seed=1, width=48, layers=3)
        tiny.save_llama(root / "student", seed=2)
        tiny.save_dataset(root / "data")
        config = base_config(
            root,
            output_dir=str(root / "out"),
            stage=stage,
            teacher_model=str(root / "teacher") if stage == "sekd" else None,
            max_steps=steps,
            logging_steps=10,
            save_strategy="steps",
            save_steps=max(1, steps // 8),
            save_total_limit=2,
            eval_dataset="tiny_valid",
            eval_strategy="steps",
            eval_steps=max(1, steps // 8),
        )
        tuner.run_exp(config, callbacks=[meter])

    return meter.rows


def in_a_fork(stage: str, steps: int) -> list[Row]:
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        return pool.apply(train, (stage, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    rows = {stage: in_a_fork(stage, steps) for stage in ("sekd", "sft")}
    second_half = {stage: values[len(values) // 2 :] for stage, values in rows.items()}
    slopes = {stage: slope(values) for stage, values in second_half.items()}

    lines = ["| step | MiB, stage | MiB, SFT | open files, stage | steps/s, stage |", "|---|---|---|---|---|"]
    pairs = list(zip(rows["sekd"], rows["sft"], strict=True))
    for ours, theirs in [*pairs[:: max(1, len(pairs) // 10)], pairs[-1]]:
        memory = f"{ours.memory / 2**20:,.1f} | {theirs.memory / 2**20:,.1f}"
        lines.append(f"| {ours.step:,} | {memory} | {ours.files} | {ours.speed:.1f} |")
    lines += [
        "",
        *(f"Slope over the second half, {stage}: {value:+,.0f} bytes/step." for stage, value in slopes.items()),
    ]
    text = "\n".join(lines)
    print(text)
    write_atomic(ROOT / "benchmarks" / "results" / "soak.md", f"{text}\n".encode())
    files = [row.files for row in second_half["sekd"]]
    if slopes["sekd"] - slopes["sft"] > LIMIT or files[-1] > files[0]:
        sys.exit("memory or open files grow")


if __name__ == "__main__":
    main()
