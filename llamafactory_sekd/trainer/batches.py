"""The micro-batches of a training: their order after a restart, and the same ones in several steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset


Batch = dict[str, Any]


class RepeatedSteps(DataLoader):
    """A data loader whose epoch has each step several times, one after the other, with the same tensors.

    The host counts an epoch's steps by its length, and skips micro-batches of it after a restart. Each step has all of
    its micro-batches: where an epoch's last step has fewer, it begins with empty ones, which train nothing. So the
    host's count of steps is right for every repetition, and the last micro-batch, with which ranks exchange
    gradients, is a real one.

    Args:
        loader: this rank's, as accelerate prepared it.
        accumulation: the micro-batches of a step.
        times: how often each step comes.
        read: what to do with each micro-batch as soon as it is read.
        epoch: the epoch that begins or, after a restart, goes on.
    """

    def __init__(
        self,
        loader: Any,
        accumulation: int,
        times: int,
        read: Callable[[Batch], Batch],
        epoch: Callable[[], int],
    ) -> None:
        # Of a data set without places accelerate skips the first batches by reading them, whatever else reads it. The
        # generator keeps torch's own as it is for samplers that draw from it.
        batches = _Repeated(loader, accumulation, times, read, epoch)
        super().__init__(batches, batch_size=None, generator=torch.Generator())
        self._loader, self._accumulation, self._times = loader, accumulation, times

    def __len__(self) -> int:
        """Return the micro-batches of an epoch.

        Raises:
            TypeError: the data set is streamed and has no length.
        """
        return -(-len(self._loader) // self._accumulation) * self._accumulation * self._times


class _Repeated(IterableDataset):
    """The micro-batches of :class:`RepeatedSteps`, whose arguments it takes."""

    def __init__(
        self, loader: Any, accumulation: int, times: int, read: Callable[[Batch], Batch], epoch: Callable[[], int]
    ) -> None:
        self.loader, self.accumulation, self.times, self.read, self.epoch = loader, accumulation, times, read, epoch

    def __len__(self) -> int:
        """Return the examples of an epoch, each as often as it is trained on."""
        return len(self.loader.dataset) * self.times

    def __iter__(self) -> Iterator[Batch]:
        # After a restart the loader counts from 0; a streamed data set is read several times in what counts as one.
        self.loader.set_epoch(max(self.loader.iteration, self.epoch()))
        batches = map(self.read, self.loader)
        while step := list(islice(batches, self.accumulation)):
            missing = self.accumulation - len(step)
            step = [{name: value[:0] for name, value in step[-1].items()}] * missing + step
            for _ in range(self.times):
                yield from step


def is_empty(batch: Batch) -> bool:
    """Whether a micro-batch has no example and only fills up a step."""
    return len(batch["input_ids"]) == 0


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
