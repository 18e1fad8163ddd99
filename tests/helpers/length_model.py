"""A random Llama whose output is about as long as a translation would be, made by hand instead of by training.

Batching pays only where outputs end at different steps, and a random model never ends. Here one attention head looks
at everything with equal weight and so computes a mean: source tokens count up (each by its own random amount, so
that equally long sentences differ), generated tokens count down, and once the sum falls below zero the end token
wins by a wide margin. Which tokens are generated until then is up to random layers, so every sentence gets an output
of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.data.prompts import prompt


BOS, EOS, PAD = 0, 1, 2
# Dimensions of the residual stream that are not random: a constant, a token's count, and the mean of the counts.
_CONSTANT, _COUNT, _MEAN = 0, 1, 2
_UNIT = 0.02
# Far above the random logits even for a mean just below zero.
_CERTAINTY = 5000 / _UNIT


def save_length_model(
    directory: Path,
    sentences: Sequence[str],
    *,
    seed: int = 0,
    width: int = 64,
    layers: int = 2,
    words: int = 400,
    ratio: float = 1.2,
    direction: str = "en-de",
) -> Path:
    """Save the model and its tokenizer, trained on ``sentences``; ``ratio`` is target tokens by source tokens.

    Half of the vocabulary (``words`` each) reads, the other half is what the model writes.
    """
    torch.manual_seed(seed)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _save_tokenizer(directory, sentences, words)
    readable = len(tokenizer) - words
    counts = 2 * ratio * torch.rand(len(tokenizer))
    counts[readable:] = -1.0
    frame = tokenizer.encode(prompt("", parse_direction(direction)), add_special_tokens=False)
    counts[[BOS, EOS, PAD]] = 0.0
    counts[BOS] = 0.5 - counts[frame].sum()

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(4, width // 64),
        num_key_value_heads=max(4, width // 64),
        max_position_embeddings=2048,
        initializer_range=2 / width**0.5,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    _set_weights(model, counts, readable)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def _set_weights(model: LlamaForCausalLM, counts: torch.Tensor, readable: int) -> None:
    embedding = torch.randn_like(model.model.embed_tokens.weight)
    embedding[:, _CONSTANT], embedding[:, _COUNT], embedding[:, _MEAN] = 1.0, counts * _UNIT, 0.0
    # All embeddings get the same length, which the first normalization then leaves as it is.
    rest = embedding.shape[1] - 1.0 - (counts * _UNIT) ** 2
    embedding[:, 3:] *= (rest.sqrt() / embedding[:, 3:].norm(dim=1))[:, None]
    model.model.embed_tokens.weight.copy_(embedding)

    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:3] = 0.0
        layer.mlp.down_proj.weight[:3] = 0.0
    attention = model.model.layers[0].self_attn
    size = attention.head_dim
    attention.q_proj.weight[:size] = 0.0
    attention.v_proj.weight[:size] = 0.0
    attention.v_proj.weight[0, _COUNT] = 1.0
    attention.o_proj.weight[:, :size] = 0.0
    attention.o_proj.weight[_MEAN, 0] = 1.0

    head = torch.randn_like(model.lm_head.weight) / embedding.shape[1] ** 0.5
    head[:, :3] = 0.0
    head[:readable] = 0.0
    head[:readable, _CONSTANT] = -1e4
    head[EOS] = 0.0
    head[EOS, _MEAN] = -_CERTAINTY
    model.lm_head.weight.copy_(head)


def _save_tokenizer(directory: Path, sentences: Sequence[str], words: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=max(words, 300),
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*sentences, prompt("", parse_direction("en-de"))], trainer)
    # Words without merge rules: they can be written but are never read.
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for number in range(words):
        vocabulary[f"Ġwort{number}"] = len(vocabulary)
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(directory)
    return fast
