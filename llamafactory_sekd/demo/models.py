"""The demo's models: a tokenizer to which the prompt is two tokens, a tiny teacher, a student made of its layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.prompts import prompt


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4000
EOS, PAD = "</s>", "<pad>"
SEED = 42
TEACHER = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
COMMON = {
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    # The default of 0.02 is for wide models; from 0.06 these few steps get twice as far.
    "initializer_range": 0.06,
}


def prompt_pieces(direction: Direction) -> tuple[str, str]:
    """Return the text of the prompt before and after the source sentence."""
    before, after = prompt("\0", direction).split("\0")
    return before, after


def train_tokenizer(texts: list[str], direction: Direction, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of ``vocab_size`` entries in all.

    The two pieces of the prompt are entries of their own: its text stays as it is and costs two tokens, which at these
    sentence lengths halves the work. There is no beginning-of-sequence token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = prompt_pieces(direction)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(pieces),
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def save_untrained(
    records: Sequence[Path], direction: Direction, folder: Path, shape: Mapping[str, int] = TEACHER
) -> None:
    """Save a tokenizer trained on files of instruction records, and a Llama of this ``shape`` with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    pairs = [pair for path in records for pair in json.loads(path.read_text(encoding="utf-8"))]
    tokenizer = train_tokenizer([pair[side] for pair in pairs for side in ("input", "output")], direction)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **COMMON,
        **shape,
    )
    torch.manual_seed(SEED)
    save(LlamaForCausalLM(config), tokenizer, folder)


def save_student(teacher: Path, folder: Path, layers: Sequence[int] = (0, -1)) -> None:
    """Save a student that keeps the embeddings and some ``layers`` of the trained ``teacher``, the first and the last.

    From random weights the objective with hard tokens stalls: their gradient vanishes with the student's probability
    of the ground truth.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher)
    kept = [model.model.layers[index] for index in layers]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    model.model.layers = type(model.model.layers)(kept)
    model.config.num_hidden_layers = len(kept)
    save(model, AutoTokenizer.from_pretrained(teacher), folder)


def save(model: object, tokenizer: object, folder: Path) -> None:
    """Save to a hidden folder and move it into place, so that ``folder`` is complete or absent."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial)  # type: ignore[attr-defined]
    tokenizer.save_pretrained(partial)  # type: ignore[attr-defined]
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
