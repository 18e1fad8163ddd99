"""Tiny models, a tokenizer and a data set, built in process and saved to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


WORDS = {
    "house": "Haus",
    "dog": "Hund",
    "tree": "Baum",
    "book": "Buch",
    "city": "Stadt",
    "water": "Wasser",
    "light": "Licht",
}
SENTENCES = [
    (f"The {a} is near the {b}.", f"{WORDS[a]} steht bei {WORDS[b]}.") for a in WORDS for b in WORDS if a != b
]


def save_tokenizer(directory: Path, vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the sentences and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([side for pair in SENTENCES for side in pair], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(directory)
    return fast


def save_llama(
    directory: Path, *, seed: int, width: int = 32, layers: int = 2, vocab_size: int = 384, **config: Any
) -> Path:
    """Save a random Llama (and its tokenizer) and return its folder."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(directory)
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    LlamaForCausalLM(LlamaConfig(**{**settings, **config})).save_pretrained(directory)
    return directory


# What they do to their logits: a soft cap, a factor, a divisor.
FAMILIES = {
    "gemma2": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "granite": ("Granite", {"logits_scaling": 3.0}),
}


def save_scaled_or_capped(directory: Path, family: str, **changes: Any) -> Path:
    """Save a random model whose logits are more than its head's product, and its tokenizer; return its folder."""
    name, keys = FAMILIES[family]
    tokenizer = save_tokenizer(directory)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{**keys, **changes},
    )
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(directory)
    return directory


def save_dataset(directory: Path, count: int = 32) -> Path:
    """Save `count` records as the data set `tiny` (and 8 others as `tiny_valid`)."""
    directory.mkdir(parents=True, exist_ok=True)
    records = [
        {
            "instruction": "Translate the following sentences from English to German.\n\n### Input:",
            "input": source,
            "output": target,
        }
        for source, target in SENTENCES
    ]
    (directory / "tiny.json").write_text(json.dumps(records[:count]), encoding="utf-8")
    (directory / "tiny_valid.json").write_text(json.dumps(records[-8:]), encoding="utf-8")
    info = {name: {"file_name": f"{name}.json"} for name in ("tiny", "tiny_valid")}
    (directory / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return directory
