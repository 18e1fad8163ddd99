"""The order of the data after a restart."""

from __future__ import annotations

from functools import partial
from typing import Any


def hold_epoch(loader: Any) -> None:
    """Keep a training data loader's sampler from going back to an earlier epoch.

    A run that is resumed within an epoch reads the rest of it through `accelerate.skip_first_batches`, whose new
    loader counts from epoch 0 and tells the sampler so on one process: the rest of, say, the third epoch would come in
    the order of the first (accelerate 1.11). Epochs only ever grow otherwise.
    """
    sampler = loader.batch_sampler
    while hasattr(sampler, "batch_sampler") or hasattr(sampler, "sampler"):  # a shard of batches, batches, records
        sampler = getattr(sampler, "batch_sampler", None) or sampler.sampler

    if hasattr(sampler, "set_epoch") and hasattr(sampler, "epoch"):
        sampler.set_epoch = partial(_set_later_epoch, sampler)


def _set_later_epoch(sampler: Any, epoch: int) -> None:
    type(sampler).set_epoch(sampler, max(epoch, sampler.epoch))
