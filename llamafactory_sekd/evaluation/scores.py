"""Corpus scores of the surface (BLEU, chrF, TER), by the sacrebleu library."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from llamafactory_sekd.data.languages import base_code, script_of
from llamafactory_sekd.errors import EvaluationError, one_line


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
