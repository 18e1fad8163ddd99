"""Steps that come several times, as the host's loop reads and skips them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers.trainer_utils import has_length

from llamafactory_sekd.trainer.batches import RepeatedSteps, hold_epoch, is_empty


RECORDS = [{"input_ids": torch.tensor([number])} for number in range(9)]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from RECORDS


def repeated(data: Any = RECORDS, rank: int = 0, ranks: int = 1, epoch: int = 0, times: int = 3) -> RepeatedSteps:
    """Two records in a micro-batch and two of those in a step."""
    sampler = RandomSampler(data, generator=torch.Generator()) if data is RECORDS else None
    loader = prepare_data_loader(
        DataLoader(data, batch_size=2, sampler=sampler),
        num_processes=ranks,
        process_index=rank,
        put_on_device=False,
        use_seedable_sampler=True,
        data_seed=5,
    )
    hold_epoch(loader)
    return RepeatedSteps(loader, 2, times, dict, lambda: epoch)


def steps(loader: Any) -> list[list[list[int]]]:
    batches = [batch["input_ids"].flatten().tolist() for batch in loader]
    return [batches[start : start + 2] for start in range(0, len(batches), 2)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_step_comes_n_times_with_all_of_its_micro_batches(ranks):
    """Of one rank's five micro-batches, or of two ranks' three each, the last is a step of its own."""
    seen: set[int] = set()
    for rank in range(ranks):
        loader, once = repeated(rank=rank, ranks=ranks), repeated(rank=rank, ranks=ranks, times=1)
        found = steps(loader)
        assert len(loader) == 2 * len(found) == 3 * len(once)
        assert found == [step for step in steps(once) for _ in range(3)]
        assert [is_empty(batch) for batch in loader] == [False] * (len(loader) - 6) + [True, False] * 3
        seen.update(number for step in found for batch in step for number in batch)
    assert seen == set(range(9))


@pytest.mark.parametrize("epoch", [0, 2])
def test_what_is_skipped_after_a_restart_is_what_was_trained(epoch):
    uninterrupted = steps(repeated(epoch=epoch))
    assert (uninterrupted == steps(repeated())) == (epoch == 0)
    for done in range(len(uninterrupted)):
        assert steps(skip_first_batches(repeated(epoch=epoch), 2 * done)) == uninterrupted[done:]


def test_a_stream_has_no_length_and_is_repeated_as_well():
    loader = repeated(Stream())
    assert not has_length(loader)
    found = steps(loader)
    assert found[::3] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[], [8]]]
    assert all(found[start : start + 3] == [found[start]] * 3 for start in range(0, 9, 3))
