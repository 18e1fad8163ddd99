"""What is logged, written down and warned of the student's own samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from llamafactory_sekd.files import write_atomic
from llamafactory_sekd.objectives import IGNORE_INDEX
from llamafactory_sekd.trainer.sampling import Sampling


logger = logging.get_logger(__name__)

_SHOWN = 8  # samples of a step that are looked at and written down
# What is counted in a logging window: examples, own samples, their tokens and those of the references, truncated ones,
# drawings and their seconds; samples looked at, loops and other languages among them.
_COUNTS = 10
# With fewer samples looked at, a share of loops says little.
_ENOUGH = 16


@dataclass(frozen=True)
class Look:
    """What is wrong with the text of a sample: it repeats itself, or is in another language than the reference."""

    loops: bool
    other_language: bool


class OwnText(NamedTuple):
    """The tokens of an example whose response is the student's own."""

    prompt: list[int]
    reference: list[int]
    sample: list[int]


class OwnSampleLog:
    """Counts own samples over a logging window, and keeps some of the present step.

    Args:
        sampling: how they are drawn.
        every: how many steps use a sample.
        decode: token ids to text.
        accelerator: the trainer's.
        output_dir: ``samples/step-N.jsonl`` is written into it.
        look: what is wrong with a sample, from its tokens and those of the reference.
    """

    def __init__(
        self,
        sampling: Sampling,
        every: int,
        decode: Callable[[list[int]], str],
        accelerator: Any,
        output_dir: str | Path,
        look: Callable[[list[int], list[int]], Look] = lambda sample, reference: Look(False, False),
    ) -> None:
        self.sampling = sampling
        self.every = every
        self.decode = decode
        self.accelerator = accelerator
        self.folder = Path(output_dir) / "samples"
        self.look = look
        self._window = torch.zeros(_COUNTS, dtype=torch.float64)  # of numbers on this side, never on the device
        self._judged = torch.zeros(2, dtype=torch.float64)  # on the device: tokens judged, and their -log q
        self._shown: list[dict[str, Any]] = []
        self._warned: set[str] = set()

    def note(self, batches: Sequence[dict[str, Any]], texts: Sequence[OwnText], seconds: float | None) -> None:
        """Note the own samples of a step.

        Args:
            batches: its micro-batches.
            texts: in the order in which ``OWN`` numbers them.
            seconds: how long they took, None where an earlier step has drawn them.
        """
        looks = [self.look(text.sample, text.reference) for text in texts[:_SHOWN]]
        self._shown = [
            {
                "source": self.decode(text.prompt),
                "sample": self.decode(text.sample),
                "reference": self.decode(text.reference),
            }
            for text in texts[:_SHOWN]
        ]
        counts = (
            sum(int((batch["labels"] != IGNORE_INDEX).any(-1).sum()) for batch in batches),
            len(texts),
            sum(len(text.sample) for text in texts),
            sum(len(text.reference) for text in texts),
            sum(self.sampling.is_truncated(text.sample) for text in texts),
            seconds is not None,
            seconds or 0.0,
            len(looks),
            sum(look.loops for look in looks),
            sum(look.other_language for look in looks),
        )
        self._window += torch.tensor(counts, dtype=torch.float64)

    def judge(self, numbers: torch.Tensor, rows: torch.Tensor, ce: torch.Tensor, teacher_ce: torch.Tensor) -> None:
        """Note what student and teacher say of the samples of a micro-batch.

        Args:
            numbers: ``[batch]`` int64, what ``OWN`` holds.
            rows: ``[batch, length]`` bool, the positions that predict response tokens.
            ce: ``[tokens]``, -log q of each response token.
            teacher_ce: ``[tokens]``, -log p of each.
        """
        is_own = (numbers >= 0).unsqueeze(-1).expand_as(rows)[rows].to(ce.device)
        own = torch.stack([is_own.sum().double(), torch.where(is_own, ce.double(), 0.0).sum()])
        self._judged = self._judged.to(own.device) + own  # moved once: no waiting for the device in each micro-batch
        if not self._shown:
            return
        counts = rows.sum(-1).tolist()
        for number, values in zip(numbers.tolist(), teacher_ce.split(counts), strict=True):
            if 0 <= number < len(self._shown):
                self._shown[number]["teacher_logprob"] = -values.mean()

    def means(self) -> dict[str, float]:
        """Return the means of the window over all ranks, which call this together, and start a new window."""
        device = self.accelerator.device
        window = torch.cat([self._window.to(device), self._judged.to(device)])
        window = self.accelerator.reduce(window, reduction="sum")
        (examples, own, length, expected, truncated, drawings, seconds, seen, loops, others, tokens, ce) = (
            window.tolist()
        )
        self._window, self._judged = torch.zeros_like(self._window), torch.zeros_like(self._judged)
        metrics = {"kd/on_policy": own / max(1.0, examples)}
        if drawings:
            metrics["gen/seconds"] = seconds / self.accelerator.num_processes
        if own:
            metrics |= {"gen/length": length / own, "gen/truncated": truncated / own}
            self._warn_of_explosion(length / max(1.0, expected), truncated / own)
        if seen:
            metrics |= {"gen/loops": loops / seen, "gen/other_language": others / seen}
            self._warn_of_bad_text(seen, loops, others)
        if tokens and self.sampling.is_plain and self.every == 1:
            # The mean of -log q over draws from q estimates q's entropy; older samples are draws from another q.
            metrics["kd/entropy"] = ce / tokens
        return metrics

    def write(self, step: int) -> None:
        """Write the samples of the step that just ended and what the teacher said of them."""
        if not self._shown or not self.accelerator.is_main_process:
            return
        entries = [
            {**entry, "teacher_logprob": float(entry["teacher_logprob"]) if "teacher_logprob" in entry else None}
            for entry in self._shown
        ]
        lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / f"step-{step}.jsonl", "".join(f"{line}\n" for line in lines).encode())

    def _warn_of_explosion(self, ratio: float, truncated: float) -> None:
        if "length" in self._warned or (ratio < 2.0 and truncated < 0.5):
            return
        self._warned.add("length")
        logger.warning(
            f"The student's own samples are {ratio:.1f} times as long as the references, and {truncated:.0%} of them "
            "hit the limit without an end token. Usually the student does not know the template's end token: "
            "fine-tune it with the same template first, or set `kd_on_policy_truncated: drop`."
        )

    def _warn_of_bad_text(self, seen: float, loops: float, others: float) -> None:
        for kind, count, what in (
            ("loops", loops, "repeat themselves"),
            ("language", others, "are in another language than the references"),
        ):
            # Each sample is seen in `every` steps.
            if kind not in self._warned and seen >= _ENOUGH * self.every and count >= seen / 2:
                self._warned.add(kind)
                logger.warning(
                    f"{count / seen:.0%} of the student's own samples {what}: the teacher judges text that is no "
                    "translation. Fine-tune the student on references first, or lower `kd_on_policy`."
                )
