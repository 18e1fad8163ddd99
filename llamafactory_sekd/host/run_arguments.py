"""The host's argument objects of one run, in one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HostArguments:
    """What the host's parser makes of a run's keys.

    ``finetuning`` has our keys, as :class:`llamafactory_sekd.arguments.DistillationArguments`.
    """

    model: Any
    data: Any
    training: Any
    finetuning: Any
    generating: Any

    @property
    def is_first_rank(self) -> bool:
        """Tell whether this process is the one that writes and speaks."""
        return bool(self.training.process_index == 0)
