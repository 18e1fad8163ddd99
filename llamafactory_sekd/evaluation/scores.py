"""Scores: of a corpus by its surface (the sacrebleu library), of sentences by models, and chrF between sentences."""

from __future__ import annotations

import gc
import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.helpers import extract_all_char_ngrams
from sacrebleu.metrics.ter import TER

from llamafactory_sekd.data.languages import base_code, script_of
from llamafactory_sekd.errors import EvaluationError, one_line
from llamafactory_sekd.files import read_json, write_json
from llamafactory_sekd.fingerprints import sha256_of_json


# What `bleu_tokenizer` may say: one for all targets, or one per target language.
BleuTokenizer = str | Mapping[str, str] | None
TOKENIZERS = tuple(BLEU.TOKENIZERS)
# Text without spaces between its words, of which BLEU's usual tokenizer 13a makes one word per sentence.
UNSPACED_SCRIPTS = frozenset({"Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Hans", "Hant", "Hani", "Jpan"})

_SURFACE: dict[str, Callable[[str, BleuTokenizer], Metric]] = {
    "bleu": lambda target, tokenizer: _bleu(target, tokenizer),
    "chrf": lambda *_: CHRF(),
    "chrf++": lambda *_: CHRF(word_order=2),
    "spbleu": lambda *_: _with_model("spBLEU", "flores200"),
    "ter": lambda *_: TER(),
}
SURFACE_METRICS = tuple(_SURFACE)


@dataclass(frozen=True)
class Score:
    """A corpus score (0 to 100) and sacrebleu's signature of how it was made."""

    value: float
    signature: str


def surface_metric(name: str, target_language: str, bleu_tokenizer: BleuTokenizer = None) -> Metric:
    """Return a metric of sacrebleu with its defaults, as the command ``sacrebleu -m`` makes them.

    BLEU's tokenizer is what ``bleu_tokenizer`` says, or follows the target language, however its code is written:
    ``zh`` for Chinese, and so on. Where words have no spaces and sacrebleu has no tokenizer for the language, it is
    ``flores200``, or ``char`` where that cannot be had; see :func:`tokenizer_note`. Raises :class:`EvaluationError`
    when a tokenizer needs something that is not there.
    """
    return _SURFACE[name](target_language, bleu_tokenizer)


def _bleu(target: str, asked: BleuTokenizer) -> Metric:
    chosen = asked if isinstance(asked, str) else (asked or {}).get(target)
    # It warns of tokenizers that are not its first choice, for every metric that is made.
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    if chosen is None and not _needs_another(target):
        try:
            return BLEU(trg_lang=base_code(target))
        except (RuntimeError, ImportError) as error:
            raise EvaluationError(
                f"BLEU for the target language {target!r}: {one_line(str(error))}; or set `bleu_tokenizer: flores200` "
                "or `char`."
            ) from None
    if chosen is None:
        try:
            return _with_model("BLEU", "flores200")
        except EvaluationError:
            return BLEU(tokenize="char")
    return _with_model("BLEU", chosen)


def _needs_another(target: str) -> bool:
    """Tell whether sacrebleu would take 13a for a language that writes without spaces."""
    return base_code(target) not in BLEU._TOKENIZER_MAP and script_of(target) in UNSPACED_SCRIPTS


def _with_model(label: str, tokenizer: str) -> Metric:
    try:
        return BLEU(tokenize=tokenizer)
    except (OSError, RuntimeError, ImportError, SystemExit) as error:
        raise EvaluationError(
            f"{label} with the tokenizer {tokenizer!r} cannot run: {one_line(str(error))}. The tokenizers flores101, "
            "flores200 and spBLEU-1K are downloaded once, into ~/.sacrebleu/models (or $SACREBLEU/models)."
        ) from None


def tokenizer_note(target_language: str, bleu_tokenizer: BleuTokenizer = None) -> str:
    """Return what a reader has to know of BLEU into ``target_language``; empty where nothing is unusual."""
    chosen = bleu_tokenizer if isinstance(bleu_tokenizer, str) else (bleu_tokenizer or {}).get(target_language)
    if script_of(target_language) not in UNSPACED_SCRIPTS:
        return ""
    if chosen in ("13a", "intl", "none"):
        return (
            f"BLEU into {target_language} means little: the tokenizer {chosen} finds no words where there are no "
            "spaces. Use chrF2, or `bleu_tokenizer: flores200`."
        )
    if chosen is not None or not _needs_another(target_language):
        return ""
    used = surface_metric("bleu", target_language).tokenizer_signature  # type: ignore[attr-defined]
    return (
        f"BLEU into {target_language} uses the tokenizer {used}: the usual 13a finds no words where there are no "
        "spaces, so it would give 0 or 100 per sentence."
    )


def score_corpus(metric: Metric, hypotheses: Sequence[str], *references: Sequence[str]) -> Score:
    """Return a corpus score of sacrebleu, against one or several sets of references, and its signature."""
    score = metric.corpus_score(list(hypotheses), [list(texts) for texts in references])
    return Score(score.score, str(metric.get_signature()))


def mean(values: Sequence[float | None]) -> float | None:
    """Return the average over directions, or None where one is missing: an average over fewer misleads."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


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


def similarity(
    hypotheses: Sequence[str], teacher: Sequence[str], target_language: str, bleu_tokenizer: BleuTokenizer = None
) -> Score:
    """Return SacreBLEU (0 to 100) with the teacher's translations as the references (the paper's Fig. 4)."""
    return score_corpus(surface_metric("bleu", target_language, bleu_tokenizer), hypotheses, teacher)


# chrF between many sentences at a time, with the n-grams and the signature of sacrebleu. Counting each sentence's
# n-grams once, and comparing all pairs at a time, takes a tenth of the time of its own function over the pairs.
_CHRF = CHRF()


def chrf_signature() -> str:
    """Return sacrebleu's signature of chrF between sentences."""
    _CHRF.num_refs = 1
    return f"chrF2|{_CHRF.get_signature()}"


def pairwise_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Return chrF, 0 to 100, of each hypothesis against each reference: ``[hypotheses, references]``."""
    grams = [extract_all_char_ngrams(text, _CHRF.char_order, False) for text in (*hypotheses, *references)]
    matches = np.zeros((_CHRF.char_order, len(hypotheses), len(references)))
    totals = np.zeros((_CHRF.char_order, len(grams)))
    for order in range(_CHRF.char_order):
        counts = _counts([found[order] for found in grams])
        left, right = counts[: len(hypotheses)], counts[len(hypotheses) :]
        matches[order] = np.stack([np.minimum(row, right).sum(axis=1) for row in left])
        totals[order] = counts.sum(axis=1)
    return _chrf(matches, totals[:, : len(hypotheses), None], totals[:, None, len(hypotheses) :], 100.0)


def _counts(grams: Sequence[Counter[str]]) -> NDArray[np.int32]:
    """Return how often each text has each n-gram of any of them: int32 ``[texts, n-grams]``."""
    places: dict[str, int] = {}
    for gram in itertools.chain.from_iterable(grams):
        places.setdefault(gram, len(places))
    counts = np.zeros((len(grams), len(places)), dtype=np.int32)
    for row, found in enumerate(grams):
        counts[row, [places[gram] for gram in found]] = list(found.values())
    return counts


def _chrf(
    matches: NDArray[Any], of_hypothesis: NDArray[Any], of_reference: NDArray[Any], best: float
) -> NDArray[np.float64]:
    """Return chrF, 0 to ``best``, of n-gram counts ``[orders, …]``: what both sides share, and what each has."""
    used = (of_hypothesis > 0) & (of_reference > 0)
    orders = np.maximum(used.sum(axis=0), 1)
    precision = (matches / np.maximum(of_hypothesis, 1) * used).sum(axis=0) / orders
    recall = (matches / np.maximum(of_reference, 1) * used).sum(axis=0) / orders
    weight = float(_CHRF.beta**2)
    below = weight * precision + recall
    return np.where(below > 0, best * (1 + weight) * precision * recall / np.where(below > 0, below, 1.0), 0.0)


class Nearest:
    """Sentences by their chrF to another one, through an index of their n-grams: they may be thousands."""

    def __init__(self, sentences: Sequence[str]) -> None:
        places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._totals = np.zeros((_CHRF.char_order, len(sentences)))
        for index, sentence in enumerate(sentences):
            for order, grams in enumerate(extract_all_char_ngrams(sentence, _CHRF.char_order, False)):
                for gram, count in grams.items():
                    places[gram].append((index, count))
                    self._totals[order, index] += count
        self._places = {gram: np.array(found).T for gram, found in places.items()}

    def scores(self, sentence: str) -> NDArray[np.float64]:
        """Return chrF (0 to 1) of every sentence with ``sentence`` as the reference."""
        matches = np.zeros_like(self._totals)
        own = np.zeros((_CHRF.char_order, 1))
        for order, grams in enumerate(extract_all_char_ngrams(sentence, _CHRF.char_order, False)):
            own[order] = grams.total()
            for gram, count in grams.items():
                if gram in self._places:
                    indices, counts = self._places[gram]
                    matches[order, indices] += np.minimum(counts, count)
        return _chrf(matches, self._totals, own, 1.0)

    def order(self, sentence: str) -> list[int]:
        """Return the places of the sentences, the nearest first; ties in their order."""
        return np.argsort(-self.scores(sentence), kind="stable").tolist()
