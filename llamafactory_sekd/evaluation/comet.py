"""COMET models of any kind, by the unbabel-comet library, on a GPU where there is one."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from llamafactory_sekd.config import read_config
from llamafactory_sekd.errors import EvaluationError, SekdError, one_line
from llamafactory_sekd.evaluation.segment_scores import Predict, SegmentScorer, Texts
from llamafactory_sekd.fingerprints import Digests


BATCH_SIZE = 16
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
    checkpoint = _checkpoint(name, comet)
    _find_encoder(checkpoint)
    try:
        model = _load(checkpoint)
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
    return SegmentScorer(metric, signature, needs_references, partial(_predictor, checkpoint, reads_references))


def _checkpoint(name: str, comet: Any) -> Path:
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


def _first_cause(error: BaseException) -> str:
    """Return what went wrong first: comet itself turns everything into "not supported"."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {shorten(one_line(str(error)), 300, placeholder=' …').rstrip('.')}"


def _why_not_downloaded(error: BaseException) -> str:
    """Return the cause in two words where it is the usual one."""
    chain: list[BaseException] = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    kinds = [type(one).__name__ for one in chain]
    unreachable = any(word in kind for kind in kinds for word in _NO_NETWORK)
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


def _load(checkpoint: Path) -> Any:
    import comet

    _quiet()
    encoder = _encoder_of(checkpoint)
    offline = encoder is not None and _is_here(encoder)  # what is there need not be asked for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return comet.load_from_checkpoint(str(checkpoint), local_files_only=offline).eval()


def _predictor(checkpoint: Path, reads_references: bool) -> Predict:
    model = _load(checkpoint)

    def predict(texts: Texts) -> list[float]:
        return _predict(model, texts.sources, texts.hypotheses, texts.references if reads_references else None)

    return predict


def _predict(
    model: Any, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str] | None
) -> list[float]:
    import torch

    samples = [{"src": source, "mt": hypothesis} for source, hypothesis in zip(sources, hypotheses, strict=True)]
    if references is not None:
        samples = [{**sample, "ref": reference} for sample, reference in zip(samples, references, strict=True)]
    gpus = 1 if torch.cuda.is_available() else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model.predict(samples, batch_size=BATCH_SIZE, gpus=gpus, accelerator="auto" if gpus else "cpu")
    return [float(score) for score in output.scores]


def _quiet() -> None:
    """Lightning tells about devices at every prediction, and comet about the encoder at every loading."""
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch", "comet"):
        logging.getLogger(name).setLevel(logging.ERROR)
