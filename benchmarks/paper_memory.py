"""The memory of the paper's runs on 8 devices with ZeRO-3, as `sekd doctor` estimates it: a table for the docs.

    python benchmarks/paper_memory.py

The models are built without content from the sizes of Llama 1 as published, so nothing is downloaded and no device is
needed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.planner.estimate import estimate
from llamafactory_sekd.planner.planned_run import Blueprint, Run, read_deepspeed


DEEPSPEED = Path(__file__).parents[1] / "examples" / "deepspeed" / "ds_z3_config.json"
# Width, inner width, layers, heads.
SIZES = {
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "30B": (6656, 17920, 60, 52),
}


def main() -> None:
    runs = {
        "7B from 13B": papers_run("7B", "13B"),
        "7B from 30B": papers_run("7B", "30B"),
        "…, no gradient checkpointing": papers_run("7B", "30B", checkpointing=False),
        "13B from 30B": papers_run("13B", "30B"),
        "7B, SFT": replace(papers_run("7B", "13B"), teacher=None, distillation=None),
    }
    estimates = {label: estimate(run) for label, run in runs.items()}
    names = list(dict.fromkeys(row.name for result in estimates.values() for row in result.rows))
    lines = [["GiB per device, backward / step", *runs], ["---", *("---:" for _ in runs)]]
    for name in names:
        rows = [next((row for row in result.rows if row.name == name), None) for result in estimates.values()]
        lines.append([name, *("-" if row is None else both(row.backward, row.step) for row in rows)])

    lines.append(["**sum**", *(both(result.backward, result.step) for result in estimates.values())])
    for cells in lines:
        print(f"| {' | '.join(cells)} |")


def papers_run(student: str, teacher: str, checkpointing: bool = True) -> Run:
    """Table 1 and 2's settings: 4 sentences of 512 tokens at a time, bfloat16 under ZeRO-3."""
    return Run(
        llama(student, checkpointing),
        llama(teacher, False),
        DistillationArguments(teacher_model=teacher),
        batch_size=4,
        length=512,
        accumulation=4,
        engine_dtype=torch.bfloat16,
        devices=8,
        sharding=read_deepspeed(json.loads(DEEPSPEED.read_text(encoding="utf-8")), SIZES[student][0]),
    )


def llama(size: str, checkpointing: bool) -> Blueprint:
    width, inner, layers, heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )

    def build() -> nn.Module:
        model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float16)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

        return model

    return Blueprint(build)


def both(backward: int, step: int) -> str:
    return f"{backward / 2**30:.1f} / {step / 2**30:.1f}"


if __name__ == "__main__":
    main()
