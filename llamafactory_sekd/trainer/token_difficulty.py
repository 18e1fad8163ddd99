"""Which entries of the vocabulary are difficult: sums per ground-truth token over the entire training."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from llamafactory_sekd.arguments import TOKEN_TABLE
from llamafactory_sekd.files import write_atomic
from llamafactory_sekd.objectives import TokenStatistics


STATE_NAME = "kd_tokens.safetensors"
COLUMNS = ("id", "token", "count", "difficulty", "hard")


class TokenSums:
    """Occurrences, difficulty and hardness of every entry of the vocabulary as the ground truth.

    The sums stay on the device and are reduced over the ranks for a checkpoint and at the end.

    Args:
        vocab_size: the number of entries.
        device: where the sums are kept.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.sums = torch.zeros(3, vocab_size, dtype=torch.float64, device=device)

    def add(self, labels: torch.Tensor, statistics: TokenStatistics) -> None:
        """Add a micro-batch: labels ``[tokens]``; tokens without a finite difficulty or teacher are left out."""
        counts = statistics.difficulty.isfinite() & ~statistics.teacher_ce.isnan()
        rows = torch.stack([counts, statistics.difficulty.masked_fill(~counts, 0.0), statistics.hard * counts])
        self.sums.index_add_(1, labels.to(self.sums.device), rows.to(self.sums.device, self.sums.dtype))

    def total(self, accelerator: Any) -> torch.Tensor:
        """Return the sums of all ranks, which call this together, on the CPU."""
        return accelerator.reduce(self.sums.clone(), reduction="sum").cpu()

    def restore(self, checkpoint: str | Path | None) -> None:
        """Continue from what :func:`save_sums` wrote, or from nothing. One rank does this for all."""
        path = Path(checkpoint or "") / STATE_NAME
        if checkpoint is not None and path.is_file():
            self.sums.copy_(load_file(path)["sums"])
        else:
            self.sums.zero_()


def save_sums(total: torch.Tensor, checkpoint: str | Path) -> None:
    """Write ``kd_tokens.safetensors`` into a checkpoint."""
    save_file({"sums": total}, Path(checkpoint) / STATE_NAME)


def write_table(total: torch.Tensor, tokenizer: Any, folder: str | Path) -> None:
    """Write ``token_difficulty.csv``: each token's occurrences, mean difficulty and hard share, the frequent first."""
    count, difficulty, hard = total
    seen = count.nonzero().squeeze(-1)
    order = seen[count[seen].argsort(descending=True, stable=True)].tolist()
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for index, token in zip(order, tokenizer.convert_ids_to_tokens(order), strict=True):
        times = count[index].item()
        means = (f"{sums[index].item() / times:.6g}" for sums in (difficulty, hard))
        writer.writerow([index, token, int(times), *means])
    write_atomic(Path(folder) / TOKEN_TABLE, stream.getvalue().encode("utf-8", "surrogatepass"))


class WriteTokenTable(TrainerCallback):
    """Writes the table when the training has come to its end."""

    def __init__(self, sums: TokenSums, accelerator: Any) -> None:
        self.sums = sums
        self.accelerator = accelerator

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the table of tokens."""
        total = self.sums.total(self.accelerator)
        if args.should_save:
            write_table(total, kwargs["processing_class"], args.output_dir)
