"""What the ranks of a run have to agree on."""

from __future__ import annotations

import torch
import torch.distributed as dist


def position() -> tuple[int, int]:
    """Return this process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    """Go on when every rank has come here."""
    if position()[1] > 1:
        dist.barrier()


def on_any_rank(flag: torch.Tensor) -> bool:
    """Whether a flag is set on any rank: a sharded teacher computes on all of them or on none.

    Args:
        flag: 0-dimensional, on the device that the ranks communicate with.
    """
    if position()[1] > 1:
        flag = flag.to(torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX)

    return bool(flag)
