"""One process, or several under torchrun: the little that they have to tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar


if TYPE_CHECKING:
    import torch


T = TypeVar("T")
# One rank may still decode its last long batches, or rank 0 hash a large model, while the others wait.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process (``rank``) among ``world`` processes."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Tell whether this rank writes what is written once."""
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """Return this rank's part of ``items``; consecutive items go to different ranks."""
        return items[self.rank :: self.world]

    def wait(self) -> None:
        """Return when all ranks have arrived here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def from_first(self, value: T | None) -> T:
        """Return rank 0's ``value`` on every rank."""
        box: list[Any] = [value]
        if self.world > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did, for the length of the block.

    Only small Python objects travel, so gloo serves on GPUs too.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return

    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()


def position() -> tuple[int, int]:
    """Return this process's rank in the group that a training has formed, and how many there are."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    """Return when every rank of a training has arrived here."""
    Ranks(*position()).wait()


def on_any_rank(flag: torch.Tensor) -> bool:
    """Return whether a flag is set on any rank: a sharded teacher computes on all of them or on none.

    Args:
        flag: 0-dimensional, on the device that the ranks communicate with.
    """
    if position()[1] > 1:
        import torch
        import torch.distributed as dist

        flag = flag.to(torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
