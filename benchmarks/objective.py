"""Time and memory of the fused objective against naive autograd, Liger-Kernel, TRL and the bare matrix products.

    python benchmarks/objective.py [--smoke] [--vocab 32000 128256] [--dtype float32 bfloat16] [--rounds 5]
    python benchmarks/objective.py --only "ours, skew" "ours, skew, compiled" --threads 1 --processor-time --growth

Forward and backward pass through both heads, 2,048 response tokens, student 512 and teacher 1,024 wide. Memory is the
peak of the resident set above what stood before the first pass, each contender in a process of its own. Times are
taken in turns, round by round, and the table gives medians of ratios within one round. Half of the tokens are hard.
Beside the products: what the profiler counts outside of matrix products; a logit is one token's entry of a vocabulary.
On a machine with other work, processor time on one thread says more than the clock.
Liger takes part where it is installed (pip install --no-deps liger-kernel==0.8.5). TRL's GKD is that of trl 0.24;
where PYTHONPATH names a folder made by the next line, TRL's chunked divergence takes its place.

    pip install --no-deps --target FOLDER trl==1.16.0
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.status import Status
from rich.table import Table
from support.heads import CONTENDERS, FUSED, Heads, build_heads, objective_keys
from torch.profiler import ProfilerActivity, profile

from llamafactory_sekd.files import write_atomic
from llamafactory_sekd.objectives import distillation_loss


MIB = 2**20
PRODUCTS, WIDE_PRODUCTS = "the four products", "the four products, float32"
NAIVE, LIGER = "naive autograd, self_evolution", "Liger, JSD"
TRL, CHUNKED = "TRL, GKD", ("TRL, chunked KL", "TRL, chunked JSD")
OURS = "ours, self_evolution"
# Our figure divided by another contender's; the memory goals hold for float32 and the large vocabulary.
TIME_GOALS = {LIGER: 0.9, NAIVE: 0.65, PRODUCTS: 1.4, WIDE_PRODUCTS: 1.4}
SAME_WORK_GOALS = {("ours, KL alone", CHUNKED[0]): 0.45, ("ours, JSD alone", CHUNKED[1]): 0.33}
MEMORY_GOALS = {NAIVE: 0.12, LIGER: 0.30}
AGREEMENT_GOALS = {"float32": 1e-5, "bfloat16": 2e-2}
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")
console = Console(width=120)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler looks for a GPU and says so
    if arguments.measure_memory:
        print(json.dumps(extra_memory(arguments)))
        return
    contenders = available_contenders(arguments.only)
    result: dict[str, Any] = {"machine": machine(arguments), "versions": versions(), "runs": [], "growth": []}
    for vocab in arguments.vocab:
        for dtype in arguments.dtype:
            taking_part = [name for name in contenders if (name, dtype) != (WIDE_PRODUCTS, "float32")]
            run = measure(arguments, vocab, dtype, taking_part)
            result["runs"].append(run)
            show_run(run)
            write_atomic(arguments.out, json.dumps(result, indent=2).encode())
    result["growth"] = [growth(arguments, tokens) for tokens in arguments.growth]
    if arguments.growth:
        show_growth(result["growth"])
    write_atomic(arguments.out, json.dumps(result, indent=2).encode())
    console.print(f"Written to {arguments.out}", highlight=False)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=list(AGREEMENT_GOALS))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--widths", type=int, nargs=2, default=(512, 1024), help="of student and teacher")
    parser.add_argument("--growth", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384], help="token counts")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that warms up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--processor-time", action="store_true", help="of all threads, in place of wall time")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="these, and the products", metavar="NAME")
    parser.add_argument("--times-only", action="store_true", help="no agreement, memory or profile")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "objective.json")
    parser.add_argument("--measure-memory", metavar="CONTENDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.vocab, arguments.dtype, arguments.tokens, arguments.widths = [300], ["float32"], 64, (16, 32)
        arguments.growth, arguments.rounds, arguments.only = [32], 1, [OURS, NAIVE]
    return arguments


def available_contenders(only: list[str] | None) -> list[str]:
    if only:
        return [name for name in CONTENDERS if name in (*only, PRODUCTS, WIDE_PRODUCTS)]
    left_out = {TRL} if is_installed("trl.kernels.chunked_divergence") else set(CHUNKED)
    if not is_installed("liger_kernel"):
        console.print("Liger-Kernel is not installed and left out: pip install --no-deps liger-kernel==0.8.5")
        left_out.add(LIGER)
    return [name for name in CONTENDERS if name not in left_out]


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def measure(arguments: argparse.Namespace, vocab: int, dtype: str, contenders: list[str]) -> dict[str, Any]:
    run = {"vocab": vocab, "dtype": dtype, "tokens": arguments.tokens, "widths": list(arguments.widths)}
    run |= {"agreement": {}, "memory": {}, "beside": {}}
    further = [] if arguments.times_only else contenders
    with console.status(f"V = {vocab:,}, {dtype}: agreement"):
        run["agreement"] = agreement(arguments, vocab, dtype, [name for name in further if name in FUSED])
    for name in further:
        with console.status(f"V = {vocab:,}, {dtype}: memory of {name}"):
            run["memory"][name] = memory_in_a_process(arguments, name, arguments.tokens, vocab, dtype)
    needed = max(run["memory"].values(), default=0)
    if psutil.virtual_memory().available < needed + 2**30:
        raise SystemExit(f"{needed / 2**30:.0f} GiB of free memory are needed for V = {vocab:,}, {dtype}.")
    heads = build_heads(arguments.tokens, vocab, tuple(arguments.widths), getattr(torch, dtype))
    with console.status(f"V = {vocab:,}, {dtype}") as status:
        run["seconds"] = seconds(arguments, heads, contenders, status)
        run["beside"] = {name: beside_products(arguments, name, heads) for name in further}
    return run


def seconds(
    arguments: argparse.Namespace, heads: Heads, contenders: list[str], status: Status
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(arguments.rounds + 1):
        for name in contenders:
            status.update(f"round {number} of {arguments.rounds}: {name}")
            taken = timed(name, heads, arguments)
            if number:
                times[name].append(taken)
    return times


def timed(name: str, heads: Heads, arguments: argparse.Namespace) -> float:
    clock = time.process_time if arguments.processor_time else time.perf_counter
    heads.clear()
    start = clock()
    CONTENDERS[name](heads)
    return clock() - start


def beside_products(arguments: argparse.Namespace, name: str, heads: Heads) -> float:
    """Seconds outside of matrix products, a median."""
    times = []
    for _ in range(min(arguments.rounds, 3)):
        heads.clear()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            CONTENDERS[name](heads)
        events = [event for event in profiled.key_averages() if event.key not in MATRIX_PRODUCTS]
        times.append(sum(event.self_cpu_time_total for event in events) / 1e6)
    return statistics.median(times)


def memory_in_a_process(arguments: argparse.Namespace, name: str, tokens: int, vocab: int, dtype: str) -> int:
    """Bytes, measured by `extra_memory` in a fresh process, so that no allocator has a history."""
    sizes = ("--tokens", str(tokens), "--widths", *map(str, arguments.widths), "--vocab", str(vocab), "--dtype", dtype)
    command = [sys.executable, __file__, "--measure-memory", name, *sizes, "--threads", str(arguments.threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(output.splitlines()[-1]))


def extra_memory(arguments: argparse.Namespace) -> int:
    """Peak of the resident set during one pass minus the resident set before it (Linux)."""
    dtype, widths = getattr(torch, arguments.dtype[0]), tuple(arguments.widths)
    contender = CONTENDERS[arguments.measure_memory]
    contender(build_heads(8, 64, widths, dtype, gamma=1.0))  # what the libraries load and keep
    heads = build_heads(arguments.tokens, arguments.vocab[0], widths, dtype, gamma=1.0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    contender(heads)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def agreement(arguments: argparse.Namespace, vocab: int, dtype: str, names: list[str]) -> dict[str, list[float]]:
    """Relative error of loss, hidden and head gradient against the plain path in float64 on the same inputs."""
    heads = build_heads(min(128, arguments.tokens), vocab, tuple(arguments.widths), getattr(torch, dtype))
    errors = {}
    for name in names:
        heads.clear()
        loss = FUSED[name](heads)
        exact = [tensor.detach().double().requires_grad_() for tensor in (heads.hidden, heads.head)]
        reference = distillation_loss(
            exact[0] @ exact[1].t(),
            heads.teacher_hidden.double() @ heads.teacher_head.double().t(),
            heads.labels,
            **objective_keys(heads, FUSED[name].keywords["kd_loss"]),
        ).loss.mean()
        expected = (reference, *torch.autograd.grad(reference, exact))
        values = (loss, heads.hidden.grad, heads.head.grad)
        errors[name] = [
            float((value.detach().double() - true.detach()).norm() / true.detach().norm())
            for value, true in zip(values, expected, strict=True)
        ]
    return errors


def growth(arguments: argparse.Namespace, tokens: int) -> dict[str, float]:
    """Seconds and bytes of our default objective for a number of tokens, float32, the first vocabulary."""
    vocab = arguments.vocab[0]
    with console.status(f"growth: {tokens:,} tokens"):
        heads = build_heads(tokens, vocab, tuple(arguments.widths), torch.float32)
        timed(OURS, heads, arguments)
        times = [timed(OURS, heads, arguments) for _ in range(min(arguments.rounds, 3))]
        memory = memory_in_a_process(arguments, OURS, tokens, vocab, "float32")
    hidden = tokens * arguments.widths[0] * 4
    return {"tokens": tokens, "vocab": vocab, "seconds": statistics.median(times), "memory": memory, "hidden": hidden}


def show_run(run: dict[str, Any]) -> None:
    title = f"V = {run['vocab']:,}, {run['dtype']}, {run['tokens']:,} tokens: medians (fastest to slowest round)"
    columns = ("", "seconds", "/ products", "beside them, ns / logit", "extra MiB")
    table = Table(*columns, title=title, title_justify="left")
    logits = run["tokens"] * run["vocab"]
    for name, times in run["seconds"].items():
        span = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
        beside = f"{run['beside'][name] / logits * 1e9:.2f}" if run["beside"] else ""
        memory = f"{run['memory'][name] / MIB:,.0f}" if run["memory"] else ""
        table.add_row(name, span, f"{ratio(run, name, PRODUCTS):.2f}", beside, memory)
    console.print(table)
    for other, goal in TIME_GOALS.items():
        if {OURS, other} <= set(run["seconds"]):
            console.print(f"time of {OURS} / {other}: {ratio(run, OURS, other):.2f} (goal {goal})", highlight=False)
    for (name, other), goal in SAME_WORK_GOALS.items():
        if {name, other} <= set(run["seconds"]):
            console.print(f"time of {name} / {other}: {ratio(run, name, other):.2f} (goal {goal})", highlight=False)
    for other, goal in MEMORY_GOALS.items():
        if {OURS, other} <= set(run["memory"]):
            share = run["memory"][OURS] / max(run["memory"][other], 1)
            console.print(f"memory of {OURS} / {other}: {share:.3f} (goal {goal})", highlight=False)
    if not run["agreement"]:
        return
    worst = [max(errors) for errors in zip(*run["agreement"].values(), strict=True)]
    goal = AGREEMENT_GOALS[run["dtype"]]
    errors = ", ".join(f"{error:.1e}" for error in worst)
    console.print(f"largest relative error of loss, hidden and head gradient: {errors} (goal {goal})", highlight=False)


def ratio(run: dict[str, Any], name: str, other: str) -> float:
    pairs = zip(run["seconds"][name], run["seconds"][other], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def show_growth(rows: list[dict[str, float]]) -> None:
    table = Table(
        "tokens", "seconds", "ms / token", "extra MiB", "without hidden gradient", title="Growth with tokens"
    )
    for row in rows:
        milliseconds = 1e3 * row["seconds"] / row["tokens"]
        rest = (row["memory"] - row["hidden"]) / MIB
        values = (f"{row['tokens']:,}", f"{row['seconds']:.2f}", f"{milliseconds:.2f}", f"{row['memory'] / MIB:,.0f}")
        table.add_row(*values, f"{rest:,.0f}")
    console.print(table)


def machine(arguments: argparse.Namespace) -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads"


def versions() -> str:
    names = []
    for name in ("torch", "liger-kernel", "trl"):
        try:
            names.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(names)


if __name__ == "__main__":
    main()
