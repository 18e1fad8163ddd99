"""Whole optimizer steps through the host's trainer: distillation against SFT and the teacher's forward pass.

    python benchmarks/step.py [--smoke] [--steps 7] [--batch-size 8]

Four runs, each in a process of its own: the host's SFT of the student, our stage with two objectives, and the teacher
alone. They take their steps in turns, on the same batches of real sentences, and the table gives the medians over the
steps of ratios within one turn. float32, gradient checkpointing and every other setting as the host has them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from support.contender import Contender
from support.training import run_benchmark, save_material, step_parser, surroundings, take_turns, training_config


TIME_GOAL, MEMORY_GOAL = 1.05, 1.2
OBJECTIVES = ("self_evolution", "forward_kl")


def main() -> None:
    arguments = parse_arguments()
    run_benchmark(measure, report, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = step_parser(__doc__, "step.json")
    parser.add_argument("--accumulation", type=int, default=1, help="in so many micro-batches")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.steps, arguments.warm_up, arguments.batch_size = 2, 1, 4

    return arguments


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the contenders and return what the table shows."""
    turns = arguments.warm_up + arguments.steps
    objectives = OBJECTIVES[:1] if arguments.smoke else OBJECTIVES
    material = save_material(folder, turns * arguments.batch_size, arguments.smoke)
    student = training_config(
        folder,
        arguments,
        per_device_train_batch_size=arguments.batch_size // arguments.accumulation,
        gradient_accumulation_steps=arguments.accumulation,
    )
    distilled = {**student, "stage": "sekd", "teacher_model": str(folder / "teacher")}
    configs = {"sft": student, **{loss: {**distilled, "kd_loss": loss} for loss in objectives}}
    contenders = [
        Contender(name, {**config, "output_dir": str(folder / name)}, folder / f"{name}.log")
        for name, config in configs.items()
    ]
    teacher = {"model_name_or_path": str(folder / "teacher"), "disable_gradient_checkpointing": True}
    config = {**student, **teacher, "output_dir": str(folder / "forward")}
    contenders.append(Contender("teacher", config, folder / "teacher.log", forward_only=True))
    seconds = take_turns(contenders, turns)
    return {
        **surroundings(),
        "data": material.source,
        "parameters": material.sizes,
        "objectives": objectives,
        "sentences per step": arguments.batch_size,
        "steps": arguments.steps,
        "seconds": {name: values[arguments.warm_up :] for name, values in seconds.items()},
        "memory": {contender.name: contender.finish() for contender in contenders},
    }


def report(result: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{result['data']}; {result['machine']}; {result['versions']}", highlight=False)
    sizes = ", ".join(f"{name} {size / 1e6:.1f}M" for name, size in result["parameters"].items())
    console.print(f"{sizes} parameters; {result['sentences per step']} sentences a step", highlight=False)
    table = Table("Medians over the steps", "Goal", *result["objectives"])
    for label, goal, values in ratios(result):
        table.add_row(label, goal, *(f"{value:.2f}" for value in values))
    console.print(table)


def ratios(result: dict[str, Any]) -> list[tuple[str, str, list[float]]]:
    """The table's rows: what is divided by what, the goal, and a value per objective."""
    losses = result["objectives"]
    seconds, memory = result["seconds"], result["memory"]
    whole, response = zip(*seconds["teacher"], strict=True)
    student, teacher = (4 * result["parameters"][name] for name in ("student", "teacher"))

    def time(loss: str, teacher: tuple[float, ...]) -> float:
        turns = zip(seconds[loss], seconds["sft"], teacher, strict=True)
        return statistics.median(ours / (sft + forward) for ours, sft, forward in turns)

    # A busy system takes pages of libraries back at times, so the largest is the truest.
    imported = max(sizes["imported"] for sizes in memory.values())

    def peak(loss: str, libraries: int) -> float:
        sft = memory["sft"]["peak"] - libraries - student
        return (memory[loss]["peak"] - libraries - student - teacher) / sft

    return [
        ("time / (SFT + teacher forward)", f"{TIME_GOAL}", [time(loss, whole) for loss in losses]),
        ("  teacher's head: responses only", "", [time(loss, response) for loss in losses]),
        ("peak RSS without models / SFT's", f"{MEMORY_GOAL}", [peak(loss, 0) for loss in losses]),
        ("  and without the libraries", "", [peak(loss, imported) for loss in losses]),
    ]


if __name__ == "__main__":
    sys.exit(main())
