"""A teacher behind `sekd serve` on the same machine: what filling a cache through it costs, and a training step.

    python benchmarks/served_teacher.py [--smoke] [--rounds 3] [--blocks 4] [--steps 7]

Real ALMA sentences and the pair of benchmarks/cache.py, float32, one thread for each process; the server has a core of
its own where there are two. Ratios are medians within one run. The steps of a run come in blocks, and the first ones
of each are left out: an answer has been waiting while the other run had its turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cache import bytes_table, timed
from rich.console import Console
from rich.table import Table
from support.contender import Contender
from support.training import run_benchmark, save_material, step_parser, surroundings, training_config

from llamafactory_sekd.cli import apply_plugin


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.servers import serving


def main() -> None:
    arguments = parse_arguments()
    apply_plugin()
    run_benchmark(measure, report, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = step_parser(__doc__, "served_teacher.json")
    parser.add_argument("--rounds", type=int, default=3, help="caches built each way")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of steps of each run, warm-up included")
    parser.add_argument("--sentences", type=int, default=128, help="sentences in the caches")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.blocks, arguments.warm_up, arguments.steps = 1, 1, 1, 1
        arguments.batch_size, arguments.sentences = 4, 16

    return arguments


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    material = save_material(folder, arguments.sentences, arguments.smoke)
    cores = sorted(os.sched_getaffinity(0))
    config = training_config(
        folder, arguments, stage="sekd", teacher_model=str(folder / "teacher"), output_dir=str(folder / "out")
    )
    config["max_steps"] *= arguments.blocks
    with ExitStack() as running:
        os.sched_setaffinity(0, {cores[-1]})  # which the server inherits
        server = running.enter_context(serving(folder / "teacher"))
        os.sched_setaffinity(0, {cores[0]})
        result = {
            **surroundings(),
            "data": material.source,
            "parameters": material.sizes,
            "sentences": arguments.sentences,
            "sentences per step": arguments.batch_size,
            "building": building(folder, config, server.url, arguments.rounds),
            "seconds": steps(folder, config, server.url, arguments),
        }
    os.sched_setaffinity(0, set(cores))
    return result


def building(folder: Path, config: dict[str, Any], url: str, rounds: int) -> dict[str, list[float]]:
    """The seconds of the pass over the examples, each way, in turn."""
    from llamafactory_sekd.host import cache, served_teacher
    from llamafactory_sekd.teacher.cache.cache_manifest import Settings

    found: dict[str, list[float]] = {"local": [], "served": []}
    for number in range(rounds):
        spent = {"local": 0.0, "served": 0.0}
        with (
            patch.object(cache, "fill", timed(cache.fill, spent, "local")),
            patch.object(served_teacher, "fill_from_server", timed(served_teacher.fill_from_server, spent, "served")),
            patch.dict(os.environ),
        ):
            cache.build_cache(config, folder / f"local-{number}", Settings(), say=lambda _: None)
            served_teacher.build_from_server(config, folder / f"served-{number}", Settings(), url, say=lambda _: None)
        for name, seconds in spent.items():
            found[name].append(seconds)

    return found


def steps(folder: Path, config: dict[str, Any], url: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The seconds of the steps of each run, without the first ones of each block."""
    without = {key: value for key, value in config.items() if key != "teacher_model"}
    configs = {"local": config, "served": {**without, "teacher_server": url}}
    contenders = [
        Contender(name, {**run, "output_dir": str(folder / f"out_{name}")}, folder / f"{name}.log")
        for name, run in configs.items()
    ]
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    block_length = arguments.warm_up + arguments.steps
    for block in range(arguments.blocks):
        for contender in contenders if block % 2 == 0 else contenders[::-1]:
            seconds[contender.name] += [contender.step() for _ in range(block_length)][arguments.warm_up :]

    for contender in contenders:
        contender.finish()

    return seconds


def report(result: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{result['data']}; {result['machine']}; {result['versions']}", highlight=False)
    sizes = ", ".join(f"{name} {size / 1e6:.1f}M" for name, size in result["parameters"].items())
    console.print(f"{sizes} parameters; {result['sentences per step']} sentences a step", highlight=False)
    table = Table("", "Ratio", "Goal")
    table.add_row("cache through `sekd serve` / local build", f"{ratio(result['building']):.2f}", "1.15")
    table.add_row("step with a live server / with a local teacher", f"{ratio(result['seconds']):.2f}", "0.8")
    console.print(table)
    console.print(bytes_table("float32"))  # as `teacher_server` asks for them


def ratio(seconds: dict[str, list[float]]) -> float:
    return statistics.median(seconds["served"]) / statistics.median(seconds["local"])


if __name__ == "__main__":
    sys.exit(main())
