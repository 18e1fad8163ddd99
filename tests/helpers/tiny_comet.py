"""A COMET checkpoint with a two-layer XLM-R encoder, built in process: small, random, and read by the real library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from comet.models import ReferencelessRegression, RegressionMetric, UnifiedMetric
from tokenizers import SentencePieceUnigramTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizerFast


def save_comet(directory: Path, sentences: Sequence[str], kind: str = "regression_metric") -> Path:
    """Save the checkpoint as COMET's hub repositories do, ``checkpoints/model.ckpt`` and ``hparams.yaml``.

    ``kind`` is the class's name in the library; ``kiwi`` is a unified metric without references.
    """
    torch.manual_seed(0)
    encoder = directory / "encoder"
    tokenizer = _save_tokenizer(encoder, sentences)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=514,
        initializer_range=0.3,
    )
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(encoder)
    options = {"pretrained_model": str(encoder), "hidden_sizes": [32, 16], "layer_norm": False}
    if kind == "kiwi":
        kind = "unified_metric"
        model = UnifiedMetric(**options, input_segments=["mt", "src"], word_layer=2)
    else:
        classes = {
            "regression_metric": RegressionMetric,
            "referenceless_regression_metric": ReferencelessRegression,
            "unified_metric": UnifiedMetric,
        }
        model = classes[kind](**options, **({"word_layer": 2} if kind == "unified_metric" else {}))
    checkpoint = directory / "checkpoints" / "model.ckpt"
    checkpoint.parent.mkdir(parents=True)
    hparams = {**model.hparams, "class_identifier": kind}
    torch.save(
        {
            "state_dict": model.state_dict(),
            "hyper_parameters": dict(model.hparams),
            "pytorch-lightning_version": "2.0.0",
        },
        checkpoint,
    )
    (directory / "hparams.yaml").write_text(yaml.safe_dump(hparams))
    return checkpoint


def _save_tokenizer(directory: Path, sentences: Sequence[str]) -> XLMRobertaTokenizerFast:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = SentencePieceUnigramTokenizer()
    tokenizer.train_from_iterator(
        sentences, vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = XLMRobertaTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    fast.save_pretrained(directory)
    return fast
