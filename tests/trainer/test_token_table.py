"""The table of token difficulty: what is counted, what is left out, and that it agrees with the log."""

from __future__ import annotations

import csv
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import base_config, logged, train

from llamafactory_sekd.arguments import TOKEN_TABLE
from llamafactory_sekd.objectives import TokenStatistics
from llamafactory_sekd.trainer.token_difficulty import TokenSums, write_table


ONE_RANK = SimpleNamespace(reduce=lambda sums, reduction: sums)


def table(folder: Path) -> dict[int, dict[str, str]]:
    with (folder / TOKEN_TABLE).open(encoding="utf-8", newline="") as file:
        return {int(row["id"]): row for row in csv.DictReader(file)}


def test_tokens_are_counted_by_their_id_and_broken_or_infinite_ones_left_out(tmp_path):
    sums = TokenSums(6, torch.device("cpu"))
    difficulty = torch.tensor([1.0, 3.0, 5.0, math.inf, 7.0])
    hard = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
    teacher_ce = torch.tensor([0.0, 0.0, 0.0, 0.0, math.nan])
    zeros = torch.zeros(5)
    statistics = TokenStatistics(difficulty, hard, zeros, zeros, teacher_ce, zeros)
    for _ in range(2):
        sums.add(torch.tensor([2, 5, 2, 2, 1]), statistics)
    names = SimpleNamespace(convert_ids_to_tokens=lambda ids: [f'"{index},\n' for index in ids])
    write_table(sums.total(ONE_RANK), names, tmp_path)
    rows = [tuple(row.values()) for row in table(tmp_path).values()]
    assert rows == [("2", '"2,\n', "4", "3", "0.5"), ("5", '"5,\n', "2", "3", "1")]


def test_a_training_counts_each_response_token_of_every_pass(tiny_root, tmp_path):
    out = train(base_config(tiny_root, output_dir=str(tmp_path), max_steps=None, num_train_epochs=2))
    rows = table(out)
    counts = Counter({token: int(row["count"]) for token, row in rows.items()})
    assert all(count % 2 == 0 for count in counts.values())
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    # The log has the means of each step, the table those of all tokens; steps have about as many of them.
    for column, metric in (("difficulty", "kd/difficulty"), ("hard", "kd/hard_ratio")):
        mean = sum(float(row[column]) * counts[token] for token, row in rows.items()) / counts.total()
        steps = logged(out, metric)
        assert mean == pytest.approx(sum(steps) / len(steps), rel=0.05)
