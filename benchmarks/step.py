"""Whole optimizer steps through the host's trainer: distillation against SFT and the teacher's forward pass.

    python benchmarks/step.py [--smoke] [--steps 7] [--batch-size 8]

Four runs, each in a process of its own: the host's SFT of the student, our stage with two objectives, and the teacher
alone. They take their steps in turns, on the same batches of real sentences, and the table gives the medians over the
steps of ratios within one turn. float32, gradient checkpointing and every other setting as the host has them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from support.contender import Contender
from support.material import DATASET, Shape, save_llama, save_records, sentence_pairs, train_tokenizer

from llamafactory_sekd.files import write_atomic


STUDENT, TEACHER = Shape(width=256, layers=4, inner=704), Shape(width=512, layers=8, inner=1408)
SMALL_STUDENT, SMALL_TEACHER = Shape(width=32, layers=2, inner=64), Shape(width=64, layers=2, inner=128)
TIME_GOAL, MEMORY_GOAL = 1.05, 1.2
OBJECTIVES = ("self_evolution", "forward_kl")


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), arguments)

    report(result)
    write_atomic(arguments.out, json.dumps(result, indent=2).encode())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each run")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    parser.add_argument("--batch-size", type=int, default=8, help="sentences per step")
    parser.add_argument("--accumulation", type=int, default=1, help="in so many micro-batches")
    parser.add_argument("--smoke", action="store_true", help="tiny models, two steps: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.json")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.steps, arguments.warm_up, arguments.batch_size = 2, 1, 4

    return arguments


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the contenders and return what the table shows."""
    turns = arguments.warm_up + arguments.steps
    objectives = OBJECTIVES[:1] if arguments.smoke else OBJECTIVES
    sizes, source = prepare(folder, turns * arguments.batch_size, arguments.smoke)
    student = {**base_config(folder, arguments), "model_name_or_path": str(folder / "student")}
    distilled = {**student, "stage": "sekd", "teacher_model": str(folder / "teacher")}
    configs = {"sft": student, **{loss: {**distilled, "kd_loss": loss} for loss in objectives}}
    contenders = [
        Contender(name, {**config, "output_dir": str(folder / name)}, folder / f"{name}.log")
        for name, config in configs.items()
    ]
    teacher = {"model_name_or_path": str(folder / "teacher"), "disable_gradient_checkpointing": True}
    config = {**student, **teacher, "output_dir": str(folder / "forward")}
    contenders.append(Contender("teacher", config, folder / "teacher.log", forward_only=True))
    seconds: dict[str, list[Any]] = {contender.name: [] for contender in contenders}
    for turn in range(turns):
        first = turn % len(contenders)  # nobody always follows the same neighbor
        for contender in contenders[first:] + contenders[:first]:
            seconds[contender.name].append(contender.step())

    memory = {contender.name: contender.finish() for contender in contenders}
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
        "versions": {name: version(name) for name in ("llamafactory", "torch", "transformers")},
        "data": source,
        "parameters": sizes,
        "objectives": objectives,
        "sentences per step": arguments.batch_size,
        "steps": arguments.steps,
        "seconds": {name: values[arguments.warm_up :] for name, values in seconds.items()},
        "memory": memory,
    }


def prepare(folder: Path, sentences: int, smoke: bool) -> tuple[dict[str, int], str]:
    """Save models and data; return the models' sizes and where the sentences come from."""
    corpus, source = sentence_pairs(2000 if smoke else 60000)
    vocab_size = 1024 if smoke else 32000
    tokenizer = train_tokenizer(corpus, vocab_size)
    save_records(folder / "data", corpus[:sentences])
    shapes = (SMALL_STUDENT, SMALL_TEACHER) if smoke else (STUDENT, TEACHER)
    sizes = {
        name: save_llama(folder / name, shape, vocab_size, tokenizer, seed)
        for seed, (name, shape) in enumerate(zip(("student", "teacher"), shapes, strict=True))
    }
    return sizes, source


def base_config(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": DATASET,
        "dataset_dir": str(folder / "data"),
        "template": "parrot",
        "cutoff_len": 512,
        "overwrite_output_dir": True,
        "overwrite_cache": True,
        "disable_shuffling": True,  # the sentences are shuffled already: so all runs see the same batches
        "per_device_train_batch_size": arguments.batch_size // arguments.accumulation,
        "gradient_accumulation_steps": arguments.accumulation,
        "max_steps": arguments.warm_up + arguments.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
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
