"""MetricX-23 and MetricX-24 through transformers: an mT5 whose first decoded logit of one token is the error.

The score is an error from 0 (perfect) to 25. Juraska et al., "MetricX-23" (WMT 2023) and "MetricX-24" (WMT 2024).
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llamafactory_sekd.errors import EvaluationError, one_line
from llamafactory_sekd.evaluation.segment_scores import Predict, SegmentScorer, Texts, model_name
from llamafactory_sekd.evaluation.system_fingerprint import locate, source_digests
from llamafactory_sekd.evaluation.translator import ModelSource
from llamafactory_sekd.fingerprints import Digests


BATCH_SIZE = 8
# The models come without a tokenizer; this is the one that their authors use for all sizes.
TOKENIZER = "google/mt5-xl"
# `<extra_id_10>` in mT5's vocabulary.
SCORE_TOKEN = 250089
WORST = 25.0
_LONGEST = {23: 1024, 24: 1536}


def prepare_metricx(name: str, digests: Digests, has_references: bool, metric: str = "metricx") -> SegmentScorer:
    """Find the model ``name``, a directory or a hub name, and its tokenizer.

    The name says the generation (``metricx-23…``, ``metricx-24…``) and whether it reads references: those with ``qe``
    do not, MetricX-24's hybrid ones do where ``has_references``. Raises :class:`EvaluationError` when either cannot be
    had, or the model is none of this kind.
    """
    from transformers import AutoConfig

    found = re.search(r"metricx-?_?(\d\d)", model_name(name).lower())
    if found is None or int(found[1]) not in _LONGEST:
        raise EvaluationError(f"`metricx`: {name!r} must be named after a MetricX-23 or MetricX-24 model.")
    generation = int(found[1])
    reads_references = has_references if generation == 24 else "qe" not in model_name(name).lower()
    source = ModelSource(name)
    try:
        place = locate(source, metric)
    except EvaluationError as error:
        reason = str(error).removeprefix(f"`systems.{metric}`: ")
        raise EvaluationError(f"`metricx`: {reason} Write `metricx?` to go on without it.") from None
    config = AutoConfig.from_pretrained(name)
    if config.model_type != "mt5" or config.vocab_size <= SCORE_TOKEN:
        raise EvaluationError(f"`metricx`: {name} is no MetricX model: it is of type {config.model_type}.")
    _tokenizer(name)
    weights = source_digests(source, metric, digests)
    parts = {
        "model": name,
        "generation": generation,
        "references": "yes" if reads_references else "no",
        "weights": place.split("@")[-1][:16] if isinstance(place, str) else _short(weights),
        "precision": "float32",
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
    }
    signature = "|".join(f"{key}:{value}" for key, value in parts.items())
    needs_references = reads_references and generation == 23
    return SegmentScorer(metric, signature, needs_references, partial(_predictor, name, generation, reads_references))


def _short(weights: dict[str, str]) -> str:
    return "+".join(digest[:8] for file, digest in weights.items() if file.endswith((".safetensors", ".bin")))


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    own = Path(name) if any((Path(name) / file).is_file() for file in ("tokenizer.json", "spiece.model")) else None
    try:
        return AutoTokenizer.from_pretrained(own or TOKENIZER)
    except Exception as error:
        # The hub's client and the tokenizers raise dozens of types.
        reason = one_line(str(error).strip().split("\n")[0])
        raise EvaluationError(
            f"`metricx`: the tokenizer {own or TOKENIZER} cannot be loaded ({reason}): save it with the model."
        ) from None


def as_input(generation: int, source: str, hypothesis: str, reference: str | None) -> str:
    """Return the text that a MetricX model of a ``generation`` reads."""
    if generation == 23:
        return f"candidate: {hypothesis} " + (f"source: {source}" if reference is None else f"reference: {reference}")
    return f"source: {source} candidate: {hypothesis}" + ("" if reference is None else f" reference: {reference}")


def _predictor(name: str, generation: int, reads_references: bool) -> Predict:
    import torch
    from transformers import MT5ForConditionalGeneration

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = _tokenizer(name)
    model = MT5ForConditionalGeneration.from_pretrained(name, torch_dtype=torch.float32).to(device).eval()

    def predict(texts: Texts) -> list[float]:
        references: Sequence[str | None] = [None] * len(texts.sources)
        if reads_references and texts.references is not None:
            references = texts.references
        rows = zip(texts.sources, texts.hypotheses, references, strict=True)
        inputs = [as_input(generation, *row) for row in rows]
        # The end-of-text token that the tokenizer adds was not there in the models' training.
        encoded = tokenizer(inputs, max_length=_LONGEST[generation], truncation=True)["input_ids"]
        return _regress(model, [row[:-1] for row in encoded])

    return predict


def _regress(model: Any, rows: list[list[int]]) -> list[float]:
    """Return the errors, in batches of like length."""
    import torch

    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    scores = [0.0] * len(rows)
    starts = range(0, len(order), BATCH_SIZE)
    for start in tqdm(starts, desc="MetricX", unit=" batches", leave=False):
        batch = order[start : start + BATCH_SIZE]
        width = max(len(rows[index]) for index in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, index in enumerate(batch):
            ids[place, : len(rows[index])] = torch.tensor(rows[index])
            mask[place, : len(rows[index])] = 1
        with torch.inference_mode():
            logits = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                decoder_input_ids=torch.zeros((len(batch), 1), dtype=torch.long, device=model.device),
            ).logits
        for index, score in zip(batch, logits[:, 0, SCORE_TOKEN].clamp(0, WORST).tolist(), strict=True):
            scores[index] = score
    return scores
