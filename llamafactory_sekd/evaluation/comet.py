"""COMET, by the unbabel-comet library, on a GPU where there is one."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.errors import EvaluationError, one_line
from llamafactory_sekd.evaluation.fingerprint import Digests
from llamafactory_sekd.files import read_json, write_json


logger = logging.getLogger(__name__)

BATCH_SIZE = 16


@dataclass(frozen=True)
class CometScorer:
    """A COMET model that was loaded once to see that it can be; it is loaded again when scores are asked for."""

    name: str
    checkpoint: Path
    signature: str

    def score(
        self, systems: dict[Path, tuple[Sequence[str], Sequence[str], Sequence[str]]]
    ) -> dict[Path, list[float]]:
        """Return the segment scores of each entry: ``{cache file: (sources, hypotheses, references)}``.

        A cache file that already holds the scores of the same text by the same model is taken as it is; the others are
        written as soon as they are known, so a killed run goes on where it stopped.
        """
        keys = {path: self._key(texts) for path, texts in systems.items()}
        known = {path: _cached(path, key) for path, key in keys.items()}
        model = _load(self.checkpoint) if any(scores is None for scores in known.values()) else None
        result: dict[Path, list[float]] = {}
        for path, texts in systems.items():
            scores = known[path]
            if scores is None:
                logger.info("COMET: %s %s", path.parent.name, path.name.removesuffix(".comet.json"))
                scores = _predict(model, *texts)
                write_json(path, {"key": keys[path], "signature": self.signature, "scores": scores})
            result[path] = scores
        del model
        gc.collect()
        return result

    def _key(self, texts: tuple[Sequence[str], Sequence[str], Sequence[str]]) -> str:
        content = json.dumps([self.signature, *map(list, texts)], ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def prepare_comet(name: str, digests: Digests) -> CometScorer:
    """Find and load the checkpoint ``name``, a file, a directory with ``checkpoints/model.ckpt``, or a hub name.

    Raises :class:`EvaluationError` when the extra is not installed, or when the checkpoint cannot be had or loaded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import comet
    except ImportError as error:
        raise EvaluationError(
            f"The metric comet needs unbabel-comet (pip install 'llamafactory-sekd[comet]'): {one_line(str(error))}. "
            "Write `comet?` to go on without it."
        ) from None
    checkpoint = _checkpoint(name, comet)
    try:
        model = _load(checkpoint)
    except Exception as error:
        # The checkpoint is the user's, and its encoder's tokenizer may come from the hub: anything can be raised.
        reason = str(error).strip().split("\n")[0]
        raise EvaluationError(
            f"The COMET checkpoint {checkpoint} cannot be loaded ({one_line(str(reason))})."
        ) from None
    kind = type(model).__name__
    version = importlib.metadata.version("unbabel-comet")
    signature = f"model:{name}|class:{kind}|sha256:{digests.of_file(checkpoint)[:16]}|version:{version}"
    return CometScorer(name, checkpoint, signature)


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
            f"`comet_model`: {name} cannot be downloaded ({_first_cause(error)}); give a local checkpoint's path, "
            "or write `comet?` to go on without it."
        ) from None


def _first_cause(error: BaseException) -> str:
    """Return what went wrong first: comet itself turns everything into "not supported"."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _load(checkpoint: Path) -> Any:
    import comet

    _quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return comet.load_from_checkpoint(str(checkpoint)).eval()


def _predict(model: Any, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
    import torch

    samples = [
        {"src": source, "mt": hypothesis, "ref": reference}
        for source, hypothesis, reference in zip(sources, hypotheses, references, strict=True)
    ]
    gpus = 1 if torch.cuda.is_available() else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model.predict(samples, batch_size=BATCH_SIZE, gpus=gpus, accelerator="auto" if gpus else "cpu")
    return [float(score) for score in output.scores]


def _cached(path: Path, key: str) -> list[float] | None:
    content = read_json(path)
    return content["scores"] if isinstance(content, dict) and content.get("key") == key else None


def _quiet() -> None:
    """Lightning tells about devices at every prediction, and comet about the encoder at every loading."""
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch", "comet"):
        logging.getLogger(name).setLevel(logging.ERROR)
