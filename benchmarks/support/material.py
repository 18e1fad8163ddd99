"""Models and data for a benchmark: random Llamas with a real tokenizer, and ALMA's sentences for the host."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llamafactory_sekd.data.alma import DirectorySource
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.prompts import record


DATASET = "alma"
# Words per English sentence of ALMA's training data (cs-en and de-en): every fifth percentile.
WORDS_PER_SENTENCE = (1, 7, 9, 10, 12, 13, 14, 16, 17, 18, 20, 21, 22, 24, 26, 28, 30, 33, 38, 47, 170)
DIRECTIONS = tuple(Direction(*sides) for sides in (("en", "de"), ("de", "en"), ("en", "cs"), ("cs", "en")))


@dataclass(frozen=True)
class Shape:
    """The size of a random Llama."""

    width: int
    layers: int
    inner: int
    heads: int = 8


def find_alma() -> Path | None:
    """The real ALMA files: $SEKD_ALMA, or ``shared/alma`` next to the project; None where neither is there."""
    directory = Path(os.environ.get("SEKD_ALMA") or Path(__file__).parents[3] / "shared" / "alma")
    return directory if directory.is_dir() else None


def sentence_pairs(count: int, seed: int = 0) -> tuple[list[tuple[str, str, Direction]], str]:
    """Return shuffled training pairs, and in words where they come from."""
    alma = find_alma()
    generator = random.Random(seed)
    if alma is None:
        pairs = [(*_made_up_pair(generator), generator.choice(DIRECTIONS)) for _ in range(count)]
        return pairs, "made-up sentences of ALMA's lengths (the real files are not here: set SEKD_ALMA)"

    source = DirectorySource(alma)
    pairs = [
        (pair.source, pair.target, direction)
        for direction in DIRECTIONS
        for pair in source.read(direction, "train")
        if pair.source and pair.target
    ]
    generator.shuffle(pairs)
    return pairs[:count], "ALMA, training data, de-en and cs-en in both directions"


def save_records(directory: Path, pairs: list[tuple[str, str, Direction]]) -> Path:
    """Write the pairs as the data set ``alma`` of the host and return its folder."""
    directory.mkdir(parents=True, exist_ok=True)
    records = [record(source, target, direction) for source, target, direction in pairs]
    (directory / f"{DATASET}.json").write_text(json.dumps(records), encoding="utf-8")
    (directory / "dataset_info.json").write_text(json.dumps({DATASET: {"file_name": f"{DATASET}.json"}}))
    return directory


def train_tokenizer(pairs: list[tuple[str, str, Direction]], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocab_size`` tokens, trained on the pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair[:2]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save_llama(directory: Path, shape: Shape, vocab_size: int, tokenizer: PreTrainedTokenizerFast, seed: int) -> int:
    """Save a random Llama, its head padded to ``vocab_size`` rows; return the number of its parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model.num_parameters()


def _made_up_pair(generator: random.Random) -> tuple[str, str]:
    words = round(_quantile(generator.random()))
    text = " ".join(f"w{generator.randrange(2000)}" for _ in range(words))
    return text, text


def _quantile(share: float) -> float:
    position = share * (len(WORDS_PER_SENTENCE) - 1)
    below = int(position)
    above = min(below + 1, len(WORDS_PER_SENTENCE) - 1)
    low, high = WORDS_PER_SENTENCE[below], WORDS_PER_SENTENCE[above]
    return low + (high - low) * (position - below)
