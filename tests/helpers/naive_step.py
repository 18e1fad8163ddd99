"""The objective over complete sentences, from the paper's equations: float64, loops, nothing of the package."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import tiny


PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Translate the following sentences from English to German.\n\n### Input:\n{source}\n\n### Response:"
)


def token_distributions(model_dir: Path, records: list[tuple[str, str]]) -> list[tuple[torch.Tensor, int]]:
    """Distribution over the next token and the token that came, for every response token of the records."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, torch_dtype=torch.float64).eval()
    result = []
    for source, target in records:
        prompt = [tokenizer.bos_token_id, *tokenizer.encode(PROMPT.format(source=source), add_special_tokens=False)]
        response = [*tokenizer.encode(target, add_special_tokens=False), tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0]
        for offset, token in enumerate(response):
            result.append((torch.softmax(logits[len(prompt) + offset - 1], dim=-1), token))

    return result


def self_evolution(
    root: Path, count: int, lam: float = 0.5, beta: float = 0.5, gamma: float = 0.4
) -> dict[str, float]:
    """Equations 4 to 9 over the first `count` sentences: the mean loss, mean difficulty and share of hard tokens."""
    records = tiny.SENTENCES[:count]
    losses, difficulties = [], []
    pairs = zip(
        token_distributions(root / "teacher", records), token_distributions(root / "student", records), strict=True
    )
    for (p, token), (q, _) in pairs:
        target = lam * p
        target[token] += 1 - lam
        difficulty = float((target * (target / q).log()).sum())
        proxy = beta * q + (1 - beta) * target
        hard = float((target * (target / proxy).log()).sum())
        losses.append(hard if difficulty > gamma else difficulty)
        difficulties.append(difficulty)

    return {
        "loss": sum(losses) / len(losses),
        "kd/difficulty": sum(difficulties) / len(losses),
        "kd/hard_ratio": sum(difficulty > gamma for difficulty in difficulties) / len(losses),
    }
