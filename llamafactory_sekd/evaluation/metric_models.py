"""Metrics that are models: COMET of any kind by the unbabel-comet library, and MetricX through transformers."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from tqdm import tqdm

from llamafactory_sekd.config import read_config
from llamafactory_sekd.errors import EvaluationError, SekdError, one_line
from llamafactory_sekd.evaluation.scores import Predict, SegmentScorer, Texts, model_name
from llamafactory_sekd.evaluation.systems import ModelSource, locate, source_digests
from llamafactory_sekd.fingerprints import Digests


COMET_BATCH = 16
REMEDY = "docs/troubleshooting.md has the remedy"
# Kinds of errors of the hub's client and its transports that say that the hub cannot be reached, or must not be asked.
_NO_NETWORK = ("Connect", "Proxy", "Offline", "Timeout", "gaierror", "LocalEntryNotFound")
# What a checkpoint's encoder needs besides the weights that the checkpoint holds.
_OF_ENCODER = ("config.json", "tokenizer.json", "sentencepiece.bpe.model")


def prepare_comet(name: str, digests: Digests, has_references: bool = True, metric: str = "comet") -> SegmentScorer:
    """Find and load the checkpoint ``name``, a file, a directory with ``checkpoints/model.ckpt``, or a hub name.

    The model is loaded once to see that it can be and what it reads: COMET needs references, XCOMET does with them and
    without, CometKiwi takes none. ``metric`` is the key of its scores. Raises :class:`EvaluationError` when the extra
    is not installed, or when the checkpoint cannot be had or loaded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import comet
    except ImportError as error:
        raise EvaluationError(
            f"The metric comet needs unbabel-comet (pip install 'llamafactory-sekd[comet]'): {one_line(str(error))}."
        ) from None
    checkpoint = _comet_checkpoint(name, comet)
    _find_encoder(checkpoint)
    try:
        model = _load_comet(checkpoint)
    except Exception as error:
        # The checkpoint is the user's, and its encoder's tokenizer may come from the hub: anything can be raised.
        raise EvaluationError(f"The COMET checkpoint {checkpoint} cannot be loaded ({_first_cause(error)}).") from None
    needs_references = bool(model.requires_references())
    reads_references = has_references and (needs_references or "ref" in model.hparams.get("input_segments", ()))
    parts = {
        "model": name,
        "class": type(model).__name__,
        "sha256": digests.of_file(checkpoint)[:16],
        "references": "yes" if reads_references else "no",
        "precision": str(next(model.parameters()).dtype).removeprefix("torch."),
        "version": importlib.metadata.version("unbabel-comet"),
        "python": platform.python_version(),
    }
    signature = "|".join(f"{key}:{value}" for key, value in parts.items())
    return SegmentScorer(metric, signature, needs_references, partial(_comet_predictor, checkpoint, reads_references))


def _comet_checkpoint(name: str, comet: Any) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        inside = path / "checkpoints" / "model.ckpt"
        if inside.is_file():
            return inside
        raise EvaluationError(f"`comet_model`: {name} has no checkpoints/model.ckpt.")
    if path.suffix == ".ckpt" or name.count("/") > 1 or name.startswith("."):
        raise EvaluationError(f"`comet_model`: {name} does not exist.")
    try:
        return Path(comet.download_model(name))
    except Exception as error:
        raise EvaluationError(
            f"`comet_model`: {name} cannot be downloaded ({_why_not_downloaded(error)}); {REMEDY}."
        ) from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield what went wrong, the first cause last: comet itself turns everything into "not supported"."""
    while error is not None:
        yield error
        error = error.__context__


def _first_cause(error: BaseException) -> str:
    *_, first = _causes(error)
    return f"{type(first).__name__}: {shorten(one_line(str(first)), 300, placeholder=' …').rstrip('.')}"


def _why_not_downloaded(error: BaseException) -> str:
    """Return the cause in two words where it is the usual one."""
    unreachable = any(word in type(one).__name__ for one in _causes(error) for word in _NO_NETWORK)
    return "no network" if unreachable else _first_cause(error)


def _find_encoder(checkpoint: Path) -> None:
    """Check that the configuration and the tokenizer of a checkpoint's encoder can be had: they are not part of it.

    The library asks the hub for minutes without a network, and then calls the vocabulary corrupted.
    """
    from huggingface_hub import hf_hub_download

    encoder = _encoder_of(checkpoint)
    if encoder is None or _is_here(encoder):
        return
    try:
        hf_hub_download(encoder, "config.json", etag_timeout=10)
    except Exception as error:  # the hub client raises whatever its transport raises
        raise EvaluationError(
            f"The COMET checkpoint {checkpoint} needs configuration and tokenizer of its encoder {encoder}, which "
            f"cannot be downloaded ({_why_not_downloaded(error)}); {REMEDY}."
        ) from None


def _is_here(encoder: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if Path(encoder).is_dir():
        return True
    config, *tokenizers = (isinstance(try_to_load_from_cache(encoder, name), str) for name in _OF_ENCODER)
    return config and any(tokenizers)


def _encoder_of(checkpoint: Path) -> str | None:
    """Return the hub name or folder of the encoder; None where the checkpoint does not say."""
    try:
        hparams = read_config(checkpoint.parents[1] / "hparams.yaml")
    except (IndexError, SekdError):
        return None
    encoder = hparams.get("pretrained_model")
    return encoder if isinstance(encoder, str) else None


def _load_comet(checkpoint: Path) -> Any:
    import comet

    _quiet_comet()
    encoder = _encoder_of(checkpoint)
    offline = encoder is not None and _is_here(encoder)  # what is there need not be asked for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return comet.load_from_checkpoint(str(checkpoint), local_files_only=offline).eval()


def _comet_predictor(checkpoint: Path, reads_references: bool) -> Predict:
    import torch

    model = _load_comet(checkpoint)
    gpus = 1 if torch.cuda.is_available() else 0

    def predict(texts: Texts) -> list[float]:
        sides = {"src": texts.sources, "mt": texts.hypotheses}
        if reads_references and texts.references is not None:
            sides["ref"] = texts.references
        samples = [dict(zip(sides, row, strict=True)) for row in zip(*sides.values(), strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = model.predict(samples, batch_size=COMET_BATCH, gpus=gpus, accelerator="auto" if gpus else "cpu")
        return [float(score) for score in output.scores]

    return predict


def _quiet_comet() -> None:
    """Lightning tells about devices at every prediction, and comet about the encoder at every loading."""
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch", "comet"):
        logging.getLogger(name).setLevel(logging.ERROR)


METRICX_BATCH = 8
# The models come without a tokenizer; this is the one that their authors use for all sizes.
TOKENIZER = "google/mt5-xl"
# `<extra_id_10>` in mT5's vocabulary.
SCORE_TOKEN = 250089
WORST = 25.0
_LONGEST = {23: 1024, 24: 1536}


def prepare_metricx(name: str, digests: Digests, has_references: bool, metric: str = "metricx") -> SegmentScorer:
    """Find the MetricX model ``name``, a directory or a hub name, and its tokenizer.

    It is an mT5 whose first decoded logit of one token is the error, from 0 (perfect) to 25. Juraska et al.,
    "MetricX-23" (WMT 2023) and "MetricX-24" (WMT 2024).

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
    _metricx_tokenizer(name)
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
    return SegmentScorer(
        metric, signature, needs_references, partial(_metricx_predictor, name, generation, reads_references)
    )


def _short(weights: dict[str, str]) -> str:
    return "+".join(digest[:8] for file, digest in weights.items() if file.endswith((".safetensors", ".bin")))


def _metricx_tokenizer(name: str) -> Any:
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


def _metricx_predictor(name: str, generation: int, reads_references: bool) -> Predict:
    import torch
    from transformers import MT5ForConditionalGeneration

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = _metricx_tokenizer(name)
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
    from torch.nn.utils.rnn import pad_sequence

    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    scores = [0.0] * len(rows)
    starts = range(0, len(order), METRICX_BATCH)
    for start in tqdm(starts, desc="MetricX", unit=" batches", leave=False):
        batch = order[start : start + METRICX_BATCH]
        tokens = [torch.tensor(rows[index], dtype=torch.long) for index in batch]
        ids = pad_sequence(tokens, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
        with torch.inference_mode():
            logits = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                decoder_input_ids=torch.zeros((len(batch), 1), dtype=torch.long, device=model.device),
            ).logits
        for index, score in zip(batch, logits[:, 0, SCORE_TOKEN].clamp(0, WORST).tolist(), strict=True):
            scores[index] = score
    return scores
