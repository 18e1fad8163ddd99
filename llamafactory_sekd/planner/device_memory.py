"""How much memory a device has."""

from __future__ import annotations

import os
import re

import torch

from llamafactory_sekd.errors import ArgumentError


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
