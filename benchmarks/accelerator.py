"""The fused objective on an accelerator: correctness, time and memory, with torch alone (no host, no network).

    python benchmarks/accelerator.py [--device cuda] [--out accelerator.json] [--smoke]

Correctness: every preset in bfloat16, float16 and float32, as it is and compiled, against the plain path in float64 on
the same inputs, which tests hold against naive references. Time (events of the device) and peak memory: ours, naive
autograd, the bare products, and Liger and TRL where they are installed, at 32,000, 128,256 and 256,000 entries; then
ours over chunk sizes. Writes JSON, and prints the tables in Markdown with the device's name. Under five minutes on one
device.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1]))
from support.heads import (
    Heads,
    bare_products,
    build_heads,
    fused,
    fused_output,
    liger_jsd,
    naive_forward_kl,
    naive_self_evolution,
    objective_keys,
    trl_gkd,
)

from llamafactory_sekd.formula import Formula
from llamafactory_sekd.objectives import OBJECTIVES, default_chunk_size, distillation_loss
from llamafactory_sekd.presets import PRESETS, expand


PRODUCTS = "the four products"
# Largest relative error of loss, hidden and head gradient against float64: a few roundings of the type.
GOALS = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 6e-3}
MOST_MOVED = 0.05  # of the tokens, to the other side of a gate
CHUNKS = (256, 512, 1024, 2048, 4096)


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    result: dict[str, Any] = {"device": name_of(device), "torch": torch.__version__, "correctness": [], "time": []}
    started = time.monotonic()
    result["correctness"] = correctness(arguments)
    save(arguments, result)
    show_correctness(result)
    for vocab in arguments.vocab:
        result["time"] += measure(arguments, device, vocab)
        save(arguments, result)
    result["chunks"] = chunk_sweep(arguments, device)
    result["seconds"] = time.monotonic() - started
    save(arguments, result)
    show_time(result)
    print(f"\n{result['seconds']:.0f} s in all; written to {arguments.out}")
    right = [row["error"] <= GOALS[row["dtype"]] and row["moved"] <= MOST_MOVED for row in result["correctness"]]
    sys.exit(0 if all(right) else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_256, 256_000])
    parser.add_argument("--dtypes", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096, help="of student and teacher")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS), metavar="NAME")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--jobs", type=int, default=8, help="processes for correctness, since compiling takes longest")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"))
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.vocab, arguments.tokens, arguments.width, arguments.rounds = [300], 64, 16, 1
    if arguments.smoke or arguments.no_compile:
        arguments.no_compile, arguments.jobs = True, 1
    return arguments


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def save(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    arguments.out.write_text(json.dumps(result, indent=2), encoding="utf-8")


def correctness(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the largest relative error of each preset in each type, eager and compiled."""
    tasks = [(preset, dtype) for dtype in arguments.dtypes for preset in arguments.presets]
    if arguments.jobs == 1:
        found = [errors(arguments, *task) for task in tasks]
    else:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # each of the processes would start one per core
        with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(partial(errors, arguments), *zip(*tasks, strict=True)))
    return [row for rows in found for row in rows]


def errors(arguments: argparse.Namespace, preset: str, dtype: str) -> list[dict[str, Any]]:
    sizes = (64, 300, (16, 24)) if arguments.smoke else (512, 8192, (256, 384))
    heads = build_heads(*sizes, getattr(torch, dtype), device=torch.device(arguments.device), alike=True)
    rows = []
    for compiled in (False,) if arguments.no_compile else (False, True):
        heads.clear()
        # Several chunks, so that sums over chunks are tested too.
        output = fused_output(heads, preset, compile=compiled, chunk_size=sizes[0] // 4)
        ours = (output.loss.detach(), heads.hidden.grad, heads.head.grad)
        exact, moved = reference(heads, preset, output.statistics.hard.bool())
        error = max(relative(one, other) for one, other in zip(ours, exact, strict=True))
        rows.append({"preset": preset, "dtype": dtype, "compiled": compiled, "error": error, "moved": moved})
    return rows


def reference(heads: Heads, preset: str, hard: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], float]:
    """Return loss, hidden and head gradient in float64, on the inputs as they are rounded.

    A token near a gate's threshold may be on its other side in half precision, which is no error of its loss. So the
    gate's decisions are taken over, and the share of tokens with another decision in float64 is returned, too.
    """
    hidden, head = (tensor.detach().double().requires_grad_() for tensor in (heads.hidden, heads.head))
    logits = (hidden @ head.t(), heads.teacher_hidden.double() @ heads.teacher_head.double().t(), heads.labels)
    keys = objective_keys(heads, preset)
    output, losses = distillation_loss(*logits, **keys), None
    formula = expand(preset, keys)
    if preset not in OBJECTIVES and formula.gate is not None and formula.gate.cooling == 0.0:
        easy, hard_side = (
            distillation_loss(*logits, **{**keys, "kd_loss": Formula(formula.target, None, side, None)}).loss
            for side in formula.sides
        )
        losses = torch.where(hard, hard_side, easy)
    loss = (output.loss if losses is None else losses).mean()
    moved = 0.0 if losses is None else float((hard != output.hard).double().mean())
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, head))), moved


def relative(ours: Any, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def contenders(arguments: argparse.Namespace) -> dict[str, Callable[[Heads], object]]:
    found: dict[str, Callable[[Heads], object]] = {PRODUCTS: bare_products}
    for preset in ("self_evolution", "self_evolution_topk", "forward_kl", "reverse_kl"):
        found[f"ours, {preset}"] = partial(fused, kd_loss=preset)
        if not arguments.no_compile:
            found[f"ours, {preset}, compiled"] = partial(fused, kd_loss=preset, compile=True)
    found["naive autograd, self_evolution"] = naive_self_evolution
    found["naive autograd, forward_kl"] = naive_forward_kl
    if importlib.util.find_spec("liger_kernel"):
        found["Liger, JSD"] = liger_jsd
    if importlib.util.find_spec("trl"):
        found["TRL, GKD"] = trl_gkd
    return found


def measure(arguments: argparse.Namespace, device: torch.device, vocab: int) -> list[dict[str, Any]]:
    """Time and memory of every contender, in turns; one that does not fit the memory says so."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = build_heads(arguments.tokens, vocab, (arguments.width,) * 2, dtype, device=device)
    taking_part = contenders(arguments)
    seconds: dict[str, list[float]] = {name: [] for name in taking_part}
    memory: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for number in range(arguments.rounds + 1):  # the first warms up, and compiles
        for name, run in taking_part.items():
            if name in left_out:
                continue
            try:
                taken, peak = timed(run, heads, device)
            except (torch.OutOfMemoryError, ImportError) as error:
                left_out[name] = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "cannot be imported"
                continue
            if number:
                seconds[name].append(taken)
            memory[name] = max(memory.get(name, 0), peak)
    products = seconds[PRODUCTS]
    return [
        {
            "vocab": vocab,
            "dtype": str(dtype).removeprefix("torch."),
            "contender": name,
            "seconds": statistics.median(times) if times else None,
            "over_products": statistics.median(a / b for a, b in zip(times, products, strict=True)) if times else None,
            "extra_mib": memory.get(name, 0) / 2**20,
            "note": left_out.get(name, ""),
        }
        for name, times in seconds.items()
    ]


def timed(run: Callable[[Heads], object], heads: Heads, device: torch.device) -> tuple[float, int]:
    """Return seconds and the peak of the memory beyond what there was before; the latter is 0 on a CPU."""
    heads.clear()
    gc.collect()
    if device.type != "cuda":
        start = time.perf_counter()
        run(heads)
        return time.perf_counter() - start, 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run(heads)
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000, torch.cuda.max_memory_allocated(device) - before


def chunk_sweep(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Self-Evolution over chunk sizes, at the middle vocabulary."""
    vocab = sorted(arguments.vocab)[len(arguments.vocab) // 2]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = build_heads(arguments.tokens, vocab, (arguments.width,) * 2, dtype, device=device)
    sizes = [size for size in CHUNKS if size <= arguments.tokens] or [arguments.tokens]
    rows = []
    for size in [*sizes, default_chunk_size(vocab, dtype, device=device)]:
        runs = [
            timed(partial(fused, kd_loss="self_evolution", chunk_size=size), heads, device)
            for _ in range(arguments.rounds + 1)
        ][1:]
        median = statistics.median(taken for taken, _ in runs)
        rows.append({"vocab": vocab, "chunk_size": size, "seconds": median, "extra_mib": runs[0][1] / 2**20})
    rows[-1]["chunk_size"] = f"{rows[-1]['chunk_size']} (default)"
    return rows


def show_correctness(result: dict[str, Any]) -> None:
    print(f"## {result['device']}, torch {result['torch']}\n\nLargest relative error against float64:\n")
    kinds = list(dict.fromkeys((row["dtype"], row["compiled"]) for row in result["correctness"]))
    print("| preset | " + " | ".join(dtype + (", compiled" if compiled else "") for dtype, compiled in kinds) + " |")
    print("|---|" + "---:|" * len(kinds))
    for preset in dict.fromkeys(row["preset"] for row in result["correctness"]):
        found = {(row["dtype"], row["compiled"]): row for row in result["correctness"] if row["preset"] == preset}
        print(f"| {preset} | " + " | ".join(f"{found[kind]['error']:.1e}" for kind in kinds) + " |")


def show_time(result: dict[str, Any]) -> None:
    print("\n| entries | | ms | time / products | extra MiB |\n|---:|---|---:|---:|---:|")
    for row in result["time"]:
        figures = (
            f"{row['seconds'] * 1e3:.1f} | {row['over_products']:.2f} | {row['extra_mib']:,.0f}"
            if row["seconds"] is not None
            else f"{row['note']} | | "
        )
        print(f"| {row['vocab']:,} | {row['contender']} | {figures} |")
    print("\n| entries | chunk size | ms | extra MiB |\n|---:|---:|---:|---:|")
    for row in result["chunks"]:
        ms, mib = row["seconds"] * 1e3, row["extra_mib"]
        print(f"| {row['vocab']:,} | {row['chunk_size']} | {ms:.1f} | {mib:,.0f} |")


if __name__ == "__main__":
    main()
