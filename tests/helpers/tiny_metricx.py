"""A MetricX model small enough to build here: an mT5 of one layer with the real vocabulary's size, and a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import SentencePieceUnigramTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import MT5Config, MT5ForConditionalGeneration, PreTrainedTokenizerFast


def save_metricx(directory: Path, sentences: Sequence[str]) -> Path:
    """Save model and tokenizer into ``directory``, whose name says the generation."""
    tokenizer = SentencePieceUnigramTokenizer()
    tokenizer.train_from_iterator(
        sentences, vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = MT5Config(
        vocab_size=250112, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, initializer_factor=3.0
    )
    model = MT5ForConditionalGeneration(config).eval()
    ids = torch.tensor([fast(sentences[0])["input_ids"]])
    with torch.no_grad():  # random scores are made to lie between 0 and 25
        first = model(input_ids=ids, decoder_input_ids=torch.zeros((1, 1), dtype=torch.long)).logits[0, 0, 250089]
        model.lm_head.weight[250089] *= 8 / first
    model.save_pretrained(directory)
    return directory
