"""What the benchmarks of whole training steps have in common: the pair of models, the YAML, the taking of turns."""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.files import write_atomic
from support.contender import Contender
from support.material import DATASET, Shape, save_llama, save_records, sentence_pairs, train_tokenizer


STUDENT, TEACHER = Shape(width=256, layers=4, inner=704), Shape(width=512, layers=8, inner=1408)
SMALL_STUDENT, SMALL_TEACHER = Shape(width=32, layers=2, inner=64), Shape(width=64, layers=2, inner=128)


@dataclass(frozen=True)
class Material:
    """The sentences, in words where they come from, and the parameters of the models that were saved."""

    corpus: list[tuple[str, str, Direction]]
    source: str
    sizes: dict[str, int]


def save_material(folder: Path, sentences: int, smoke: bool) -> Material:
    """Save student, teacher and a data set of the host."""
    corpus, source = sentence_pairs(2000 if smoke else 60000)
    vocab_size = 1024 if smoke else 32000
    tokenizer = train_tokenizer(corpus, vocab_size)
    save_records(folder / "data", corpus[:sentences])
    shapes = (SMALL_STUDENT, SMALL_TEACHER) if smoke else (STUDENT, TEACHER)
    sizes = {
        name: save_llama(folder / name, shape, vocab_size, tokenizer, seed)
        for seed, (name, shape) in enumerate(zip(("student", "teacher"), shapes, strict=True))
    }
    return Material(corpus, source, sizes)


def training_config(folder: Path, arguments: argparse.Namespace, **keys: Any) -> dict[str, Any]:
    """Return a YAML's keys for :func:`save_material`'s student, in float32, with the ``keys`` of a benchmark."""
    return {
        "stage": "sft",
        "model_name_or_path": str(folder / "student"),
        "do_train": True,
        "finetuning_type": "full",
        "dataset": DATASET,
        "dataset_dir": str(folder / "data"),
        "template": "parrot",
        "cutoff_len": 512,
        "overwrite_output_dir": True,
        "overwrite_cache": True,
        "disable_shuffling": True,  # the sentences are shuffled already: so all runs see the same batches
        "per_device_train_batch_size": arguments.batch_size,
        "max_steps": arguments.warm_up + arguments.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **keys,
    }


def step_parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all have; the results go to ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each run")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    parser.add_argument("--batch-size", type=int, default=8, help="sentences per step")
    parser.add_argument("--smoke", action="store_true", help="tiny models, two steps: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / out)
    return parser


def take_turns(contenders: Sequence[Contender], turns: int) -> dict[str, list[Any]]:
    """Let all take one step after the other, ``turns`` times; return what each step took, by name."""
    seconds: dict[str, list[Any]] = {contender.name: [] for contender in contenders}
    for turn in range(turns):
        first = turn % len(contenders)  # nobody always follows the same neighbor
        for contender in [*contenders[first:], *contenders[:first]]:
            seconds[contender.name].append(contender.step())
    return seconds


def run_benchmark(
    measure: Callable[[Path, argparse.Namespace], dict[str, Any]],
    report: Callable[[dict[str, Any]], None],
    arguments: argparse.Namespace,
) -> None:
    """Measure in a folder that is removed afterwards, show what was found, and write it to ``--out``."""
    with tempfile.TemporaryDirectory() as name, patch.dict(os.environ, {"DISABLE_VERSION_CHECK": "1"}):
        result = measure(Path(name), arguments)

    report(result)
    write_atomic(arguments.out, json.dumps(result, indent=2))


def surroundings() -> dict[str, Any]:
    """Return what a result was measured on."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
        "versions": {name: version(name) for name in ("llamafactory", "torch", "transformers")},
    }
