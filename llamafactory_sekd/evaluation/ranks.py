"""One process, or several under torchrun: the little that they have to say to each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar


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
