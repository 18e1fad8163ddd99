"""The estimate as a table, held against the memory that a device has, and what makes a run fit that does not."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from llamafactory_sekd.arguments import AUTO
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.planner.estimate import Estimate
from llamafactory_sekd.planner.planned_run import Run


# Of the memory: beyond it the allocator's gaps may be one too many.
TIGHT = 0.95


@dataclass(frozen=True)
class Remedy:
    """A change to the YAML.

    Attributes:
        keys: the keys to set; None takes a key out.
        text: the change in words, for the table.
        cost: what is paid for it.
    """

    keys: Mapping[str, Any]
    text: str
    cost: str


@dataclass(frozen=True)
class Priced:
    """A remedy and the bytes per device that remain with it alone, and with all before it."""

    remedy: Remedy
    alone: int
    together: int


def print_estimate(console: Console, result: Estimate, run: Run, memory: int) -> None:
    """Print the parts at the peak of the backward pass and in the optimizer's step, and whether `memory` is enough."""
    table = Table("GiB per device", "backward", "step", "", title=_title(run))
    for column in table.columns[1:3]:
        column.justify = "right"

    for row in result.rows:
        table.add_row(row.name, _gib(row.backward), _gib(row.step), row.why)

    table.add_section()
    table.add_row("[bold]sum[/]", *(f"[bold]{_gib(size)}[/]" for size in (result.backward, result.step)))
    table.add_row("device", "", _gib(memory), _verdict(result, memory))
    if result.host:
        table.add_row("main memory", "", _gib(result.host * run.devices), "of the ranks of all devices together")

    console.print(table)
    for note in result.notes:
        console.print(f"Note: {note}.", highlight=False, markup=False, soft_wrap=True)


def print_remedies(console: Console, priced: Iterable[Priced], memory: int) -> None:
    """Print the remedies of a run that does not fit, as they are estimated."""
    table = Table("Ways to save memory, cheapest first", "alone", "cumulative", "cost")
    table.columns[0].no_wrap = True
    for item in priced:
        cells = [f"[green]{_gib(size)}[/]" if size <= memory else _gib(size) for size in (item.alone, item.together)]
        table.add_row(item.remedy.text, *cells, item.remedy.cost)

    console.print(table if table.rows else "It does not fit, and no remedy is known: use larger or more devices.")


def fits(result: Estimate, memory: int) -> bool:
    """Whether the peak is within the device's memory."""
    return result.device <= memory


def print_verdict(
    console: Console, result: Estimate | None, memory: int, *, problems: int = 0, readable: bool = True
) -> None:
    """Print the answer in one line.

    Args:
        console: where to.
        result: the estimate; None where a model does not exist.
        memory: bytes of a device.
        problems: how many lines above name something that keeps the run from starting.
        readable: whether its data could be read.
    """
    if result is None:
        memory_text = "To plan its memory now, name models of the same sizes."
    else:
        sizes = f"{_gib(result.device)} of {_gib(memory)} GiB per device"
        how = "fits tightly" if result.device > TIGHT * memory else "fits"
        memory_text = f"{how}, {sizes}."
        if not fits(result, memory):
            memory_text = f"does not fit, {sizes}. Ways to save memory are above."

    if problems:
        start = f"cannot start: {'a problem is' if problems == 1 else f'{problems} problems are'} named above."
        text = f"{start} {memory_text if result is None else f'In memory it {memory_text}'}"
    else:
        text = memory_text if readable else f"{memory_text} Its data cannot be read yet (see above)."
    console.print(f"Verdict: this run {text}", soft_wrap=True)


def _verdict(result: Estimate, memory: int) -> str:
    if not fits(result, memory):
        return "[bold red]does not fit[/]"
    return "[yellow]fits, tightly[/]" if result.device > TIGHT * memory else "[green]fits[/]"


def _title(run: Run) -> str:
    devices = "1 device" if run.devices == 1 else f"{run.devices} devices"
    how = f"DeepSpeed ZeRO-{run.sharding.stage}" if run.sharding else "DDP" if run.devices > 1 else ""
    tokens = f"{run.batch_size} × {run.length} tokens"
    return ", ".join(part for part in (devices, how, tokens) if part)


def _gib(size: int) -> str:
    if size == 0:
        return "-"
    return f"{size / 2**30:.2f}" if size >= 0.01 * 2**30 else "<0.01"


# Vendors write GB where they mean these.
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_memory(text: str) -> int:
    """Bytes of "80GB", "24 GiB" or "40960MB"; units are powers of 1,024, as for the names of devices.

    Raises:
        ArgumentError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ArgumentError(f"`--memory {text}` is not a size: write for example 80GB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def device_memory() -> int | None:
    """Bytes of this machine's first CUDA device; None without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def main_memory() -> int:
    """Bytes of this machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_memory() -> int:
    """Bytes that this process takes now."""
    import psutil

    return psutil.Process().memory_info().rss


def devices_of_the_environment() -> int:
    """How many ranks the environment asks for, as the host's launcher reads it: torchrun's, or one per device."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    per_node = int(os.environ.get("NPROC_PER_NODE") or max(torch.cuda.device_count(), 1))
    return int(os.environ.get("NNODES") or 1) * per_node


def price(
    config: Mapping[str, Any], run: Run, needed: int, memory: int, plan: Callable[[Mapping[str, Any]], Estimate]
) -> Iterator[Priced]:
    """Estimate the run with each remedy; ends with the first that, alone or with those before it, makes it fit.

    Remedies that save less than a hundredth are left out.

    Args:
        config: the YAML's keys.
        run: the run that does not fit.
        needed: bytes per device that it needs as it is.
        memory: bytes of a device.
        plan: from a YAML's keys to its estimate.
    """
    gathered: dict[str, Any] = {}
    for remedy in remedies_for(config, run):
        if "teacher_cache" in gathered and any(key.startswith("teacher_") for key in remedy.keys):
            continue  # the teacher is gone already
        alone = plan(_changed(config, remedy.keys)).device
        if alone > 0.99 * needed:
            continue
        gathered.update(remedy.keys)
        together = alone if gathered == remedy.keys else plan(_changed(config, gathered)).device
        yield Priced(remedy, alone, together)
        if min(alone, together) <= memory:
            return


def _changed(config: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**config, **keys}.items() if value is not None}


def remedies_for(config: Mapping[str, Any], run: Run) -> list[Remedy]:
    """Return the remedies that a run has not taken yet, the cheapest first."""
    return [*_of_training(config, run), *_of_teacher(config, run), *_of_method(config)]


def _of_training(config: Mapping[str, Any], run: Run) -> Iterator[Remedy]:
    if config.get("disable_gradient_checkpointing"):
        keys: dict[str, Any] = {"disable_gradient_checkpointing": None}
        yield Remedy(keys, "remove disable_gradient_checkpointing", "a second forward pass of the student")

    if run.batch_size != 1:
        keys = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": run.accumulation * run.batch_size}
        text = "\n".join(f"{key}: {value}" for key, value in keys.items())
        yield Remedy(keys, text, "smaller products, the same loss")

    if run.student.quantization_bit is not None or config.get("teacher_model_device", AUTO) != AUTO:
        return  # no ZeRO-3: it takes neither a quantized student nor a teacher on a device of its own
    if run.devices > 1 and (run.sharding is None or run.sharding.stage != 3):
        yield Remedy({"deepspeed": _zero_3()}, "deepspeed: a file with ZeRO-3", "communication")

    offloads = run.sharding is not None and run.sharding.offload_optimizer
    if run.accelerator and run.distillation is not None and not offloads:
        keys = {"deepspeed": _zero_3(offload_optimizer={"device": "cpu"})}
        yield Remedy(keys, "deepspeed: a file with ZeRO-3 and offload_optimizer", "the optimizer's step on the CPU")


def _of_teacher(config: Mapping[str, Any], run: Run) -> Iterator[Remedy]:
    if run.teacher is None:
        return
    if run.place.kind != "student":
        keys = {**{key: None for key in config if key.startswith("teacher_model")}, "teacher_cache": "teacher_cache"}
        keys.update(teacher_offload=None, teacher_deepspeed=None)
        text = "teacher_cache instead of teacher_model (sekd cache)"
        yield Remedy(keys, text, "disk, and the teacher once beforehand")

    is_as_loaded = run.accelerator and run.place.kind == "device" and run.teacher.quantization_bit is None
    if is_as_loaded and not config.get("teacher_deepspeed") and not config.get("teacher_offload"):
        cost = "the teacher's weights sent in each forward pass"
        yield Remedy({"teacher_offload": True}, "teacher_offload: true", cost)
        yield Remedy({"teacher_model_quantization_bit": 4}, "teacher_model_quantization_bit: 4", "an inexact teacher")


def _of_method(config: Mapping[str, Any]) -> Iterator[Remedy]:
    if config.get("finetuning_type", "lora") not in ("lora", "oft"):
        yield Remedy({"finetuning_type": "lora"}, "finetuning_type: lora", "another method of training")


def _zero_3(**options: Any) -> dict[str, Any]:
    sizes = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    return {"zero_optimization": {**sizes, **options}, "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
