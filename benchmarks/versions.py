"""Objectives in this checkout and in another one, in turns within one process.

    git worktree add ../before 5b6260f
    python benchmarks/versions.py ../before [--vocab 32000] [--tokens 1024] [--rounds 5] [--threads 1]
    python benchmarks/versions.py ../before --presets adaptive_kl entropy_gate

Each figure is the median over the rounds of processor time here / there, forward and backward pass through both heads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType

import torch
from support.heads import Heads, build_heads, objective_keys


PACKAGE = "llamafactory_sekd"
HERE = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--presets", nargs="+", help="of both; default: the paper's objectives", metavar="NAME")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--widths", type=int, nargs=2, default=(512, 1024), help="of student and teacher")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    here, there = (loaded(folder) for folder in (HERE, arguments.other.resolve()))
    heads = build_heads(arguments.tokens, arguments.vocab, tuple(arguments.widths), torch.float32)
    print(f"V = {arguments.vocab:,}, {arguments.tokens:,} tokens, float32: time here / in {arguments.other}")
    for name in arguments.presets or there.OBJECTIVES:
        ratios, losses = [], set()
        for number in range(arguments.rounds + 1):
            (ours, loss), (theirs, other_loss) = (timed(module, heads, name) for module in (here, there))
            losses |= {round(loss, 5), round(other_loss, 5)}
            if number:
                ratios.append(ours / theirs)
        span = f"({min(ratios):.2f} to {max(ratios):.2f})"
        same = "the same loss" if len(losses) == 1 else f"losses {sorted(losses)}"
        print(f"{name:20} {statistics.median(ratios):.2f} {span}, {same}", flush=True)


def loaded(folder: Path) -> ModuleType:
    """Import the objectives of a checkout; what was imported of another stays usable."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    import llamafactory_sekd.objectives as objectives

    sys.path.remove(str(folder))
    if not Path(str(objectives.__file__)).is_relative_to(folder):
        raise SystemExit(f"{folder} holds no {PACKAGE}.")
    return objectives


def timed(objectives: ModuleType, heads: Heads, kd_loss: str) -> tuple[float, float]:
    heads.clear()
    start = time.process_time()
    loss = objectives.fused_linear_distillation(
        heads.hidden,
        heads.head,
        heads.teacher_hidden,
        heads.teacher_head,
        heads.labels,
        num_items=len(heads.labels),
        chunk_size=objectives.default_chunk_size(len(heads.head), heads.head.dtype),
        **objective_keys(heads, kd_loss),
    ).loss
    loss.backward()
    return time.process_time() - start, loss.item()


if __name__ == "__main__":
    main()
