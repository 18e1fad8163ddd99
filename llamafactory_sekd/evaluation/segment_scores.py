"""Scores per sentence, by models: one interface for all of them, and what was scored before is kept."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.files import read_json, write_json
from llamafactory_sekd.fingerprints import sha256_of_json


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """What a metric reads, aligned; ``references`` is None where there are none."""

    sources: Sequence[str]
    hypotheses: Sequence[str]
    references: Sequence[str] | None


# A loaded model: texts in, a score per sentence out.
Predict = Callable[[Texts], list[float]]


@dataclass(frozen=True)
class SegmentScorer:
    """A metric that is a model. ``load`` is called when scores are asked for that are not known yet.

    ``metric`` is its key in the results, ``signature`` all that could change a score. Ranks hand it to each other, so
    ``load`` can be pickled.
    """

    metric: str
    signature: str
    needs_references: bool
    load: Callable[[], Predict]

    def score(self, systems: Mapping[Path, Texts]) -> dict[Path, list[float]]:
        """Return the segment scores of each entry of ``{cache file: texts}``.

        A cache file that already holds the scores of the same text by the same model is taken as it is; the others are
        written as soon as they are known, so a killed run goes on where it stopped.
        """
        keys = {path: self._key(texts) for path, texts in systems.items()}
        result: dict[Path, list[float]] = {}
        predict: Predict | None = None
        for path, texts in systems.items():
            scores = _cached(path, keys[path])
            if scores is None:
                predict = predict or self.load()
                logger.info("%s: %s %s", self.metric, path.parent.name, path.name.split(".")[0])
                scores = predict(texts)
                write_json(path, {"key": keys[path], "signature": self.signature, "scores": scores})
            result[path] = scores
        del predict
        gc.collect()
        return result

    def _key(self, texts: Texts) -> str:
        parts = [self.signature, list(texts.sources), list(texts.hypotheses), list(texts.references or [])]
        return sha256_of_json(parts)


def segment_file(direction: object, metric: str) -> str:
    """Return the name of the file with a metric's segment scores of a direction."""
    return f"{direction}.{metric.replace(':', '.')}.json"


def segment_key(direction: object, metric: str) -> str:
    """Return the name of a metric's segment scores in a study's results: COMET's is the direction alone."""
    return str(direction) if metric == "comet" else f"{direction} {metric}"


def model_name(location: str) -> str:
    """Return the last part of a model's name on the Hub or of its path: ``XCOMET-XL``."""
    path = Path(location)
    if path.suffix == ".ckpt":
        path = path.parents[1] if path.parent.name == "checkpoints" else path.with_suffix("")
    return path.name


def metric_keys(kind: str, locations: Sequence[str], usual: str) -> dict[str, str]:
    """Return ``{metric: location}`` of the models of a ``kind``.

    The ``usual`` one, and one alone, has the kind's own name; the others are named after the model as well.

    Raises:
        EvaluationError: two of them would have the same name.
    """
    found: dict[str, str] = {}
    for location in locations:
        key = (
            kind
            if model_name(location) == model_name(usual) or len(locations) == 1
            else f"{kind}:{model_name(location)}"
        )
        if key in found:
            raise EvaluationError(f"`{kind}`: {found[key]} and {location} have the same name: rename a folder.")
        found[key] = location
    return found


def _cached(path: Path, key: str) -> list[float] | None:
    content = read_json(path)
    return content["scores"] if isinstance(content, dict) and content.get("key") == key else None
