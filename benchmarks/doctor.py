"""`sekd doctor` against reality: estimated and measured peak memory of short runs on the CPU.

    python benchmarks/doctor.py [--smoke]

Each run trains for a few steps in a process of its own. Measured is the peak of its resident memory, less that of a
run with models of almost no size: what the libraries and the trainer take. Estimated is what the doctor says of the
same YAML without its line about libraries. All sentence pairs are longer than `cutoff_len`, so that every batch is as
long as the estimate assumes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from support.contender import Contender
from support.material import DATASET, Shape, save_llama, save_records, sentence_pairs, train_tokenizer

from llamafactory_sekd.cli import apply_plugin
from llamafactory_sekd.files import write_atomic


GOAL = 0.25
STEPS = 2  # the second has the optimizer's states from its start
VOCABULARY = 32000
STUDENT, TEACHER = Shape(width=256, layers=6, inner=704), Shape(width=512, layers=6, inner=1408)
SMALLEST = Shape(width=16, layers=1, inner=16, heads=2)
RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"finetuning_type": "lora", "lora_target": "all", "lora_rank": 16},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 2},
}
MORE_RUNS: dict[str, dict[str, Any]] = {
    "full, no gradient checkpointing": {"disable_gradient_checkpointing": True},
    "full, accumulation": {"gradient_accumulation_steps": 2},
    "full, adamw_torch": {"optim": "adamw_torch"},
    "LoRA with the head": {"finetuning_type": "lora", "lora_target": "all", "additional_target": "lm_head"},
    "eager attention": {"flash_attn": "disabled", "disable_gradient_checkpointing": True},
    "SFT": {"stage": "sft", "teacher_model": None, "kd_loss": None},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the first three runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "doctor.json")
    arguments = parser.parse_args()
    runs = RUNS if arguments.smoke else {**RUNS, **MORE_RUNS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        smallest = {"model_name_or_path": str(folder / "smallest"), "teacher_model": str(folder / "smallest")}
        libraries = measured_peak(folder, configured(folder, "libraries", smallest))
        result = {label: compare(folder, configured(folder, label, keys), libraries) for label, keys in runs.items()}

    report(result)
    write_atomic(arguments.out, json.dumps(result, indent=2).encode())


def prepare(folder: Path) -> None:
    """Save models, and records that are longer than any batch."""
    corpus, _ = sentence_pairs(4000)
    tokenizer = train_tokenizer(corpus, 4000)
    for name, shape, vocabulary in (
        ("student", STUDENT, VOCABULARY),
        ("teacher", TEACHER, VOCABULARY),
        ("smallest", SMALLEST, len(tokenizer)),
    ):
        save_llama(folder / name, shape, vocabulary, tokenizer, seed=0)

    long = [corpus[start : start + 20] for start in range(0, 1000, 20)]
    joined = [(*(" ".join(pair[side] for pair in pairs) for side in (0, 1)), pairs[0][2]) for pairs in long]
    save_records(folder / "data", joined)


def compare(folder: Path, config: dict[str, Any], libraries: int) -> dict[str, int]:
    """Estimate and measure one run, in bytes."""
    estimated = estimated_peak(config)
    return {"estimated": estimated, "measured": measured_peak(folder, config) - libraries, "libraries": libraries}


def measured_peak(folder: Path, config: dict[str, Any]) -> int:
    contender = Contender(config["output_dir"], config, folder / "log.txt")
    for _ in range(config["max_steps"]):
        contender.step()

    return contender.finish()["peak"]


def estimated_peak(config: dict[str, Any]) -> int:
    apply_plugin()
    from llamafactory_sekd.host.memory_plan import parse, run_of
    from llamafactory_sekd.planner.estimate import estimate

    return estimate(run_of(parse(config), 1, accelerator=False), libraries=0).device


def configured(folder: Path, label: str, keys: dict[str, Any]) -> dict[str, Any]:
    config = {
        "model_name_or_path": str(folder / "student"),
        "stage": "sekd",
        "finetuning_type": "full",
        "teacher_model": str(folder / "teacher"),
        "kd_loss": "self_evolution",
        "do_train": True,
        "dataset": DATASET,
        "dataset_dir": str(folder / "data"),
        "template": "parrot",
        "cutoff_len": 256,
        "kd_max_cut": 1.0,  # on purpose: see above
        "output_dir": str(folder / label.replace(" ", "_")),
        "overwrite_output_dir": True,
        "overwrite_cache": True,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **keys,
    }
    return {key: value for key, value in config.items() if value is not None}


def report(result: dict[str, dict[str, int]]) -> None:
    table = Table("Run", "estimated MiB", "measured MiB", "ratio", title=f"Goal: within {GOAL:.0%}")
    for label, sizes in result.items():
        ratio = sizes["estimated"] / sizes["measured"]
        table.add_row(label, *(f"{sizes[key] >> 20:,}" for key in ("estimated", "measured")), f"{ratio:.2f}")

    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
