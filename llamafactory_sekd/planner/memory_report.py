"""The estimate as a table, held against the memory that a device has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.table import Table

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.planner.estimate import Estimate
from llamafactory_sekd.planner.planned_run import Run
from llamafactory_sekd.planner.remedies import Priced


# Of the memory: beyond it the allocator's gaps may be one too many.
TIGHT = 0.95


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
