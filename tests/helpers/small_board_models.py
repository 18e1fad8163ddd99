"""Tiny translators that have learned something, so that difficulties and scores differ as they do in real life."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.tiny import SENTENCES
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.prompts import prompt


def teach(directory: Path, steps: int, learning_rate: float = 5e-3, batch: int = 14) -> None:
    """Train the model in `directory` on the tiny sentences and save it there."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    rows = []
    for source, target in SENTENCES:
        start = [tokenizer.bos_token_id, *tokenizer.encode(prompt(source, Direction("en", "de")))]
        response = [*tokenizer.encode(target), tokenizer.eos_token_id]
        rows.append((torch.tensor(start + response), torch.tensor([-100] * len(start) + response)))

    pad = torch.nn.utils.rnn.pad_sequence
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for step in range(steps):
        chosen = [rows[(step * batch + place) % len(rows)] for place in range(batch)]
        ids = pad([row for row, _ in chosen], batch_first=True)
        labels = pad([row for _, row in chosen], batch_first=True, padding_value=-100)
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    model.save_pretrained(directory)
