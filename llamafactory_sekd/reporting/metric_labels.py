"""How metrics and guards are named, scaled and marked, the same in every report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class MetricLook:
    """How a metric is shown: its name, the factor on the figure of its library, decimals, and which way is better."""

    label: str
    scale: float = 1.0
    digits: int = 1
    higher_is_better: bool = True


# COMET is shown times 100, as papers do; results.json keeps the library's own scale.
METRIC_LOOKS = {
    "bleu": MetricLook("BLEU"),
    "chrf": MetricLook("chrF2"),
    "chrf++": MetricLook("chrF2++"),
    "spbleu": MetricLook("spBLEU"),
    "ter": MetricLook("TER", higher_is_better=False),
    "comet": MetricLook("COMET", scale=100.0),
    "metricx": MetricLook("MetricX", digits=2, higher_is_better=False),
}
GUARD_LABELS = {
    "empty": "empty",
    "wrong_language": "wrong language",
    "repetition": "repetition loop",
    "hit_max_new_tokens": "hit max_new_tokens",
    "length_ratio": "length ratio",
    "extra_text": "extra text",
    "thoughts": "thoughts",
    "unaligned": "unaligned document",
}
# A share above its limit is highlighted; so is a length ratio outside of LENGTH_RATIOS.
GUARD_LIMITS = {
    "empty": 0.001,
    "wrong_language": 0.02,
    "repetition": 0.005,
    "hit_max_new_tokens": 0.01,
    "extra_text": 0.01,
    "thoughts": 1.0,  # what a model thinks is its own business
    "unaligned": 0.01,
}
LENGTH_RATIOS = (0.8, 1.25)
AVERAGE = "average"
BETTER, WORSE = "†", "▾"
MARKS = (
    f"{BETTER} marks a system that is significantly better than the baseline, {WORSE} one that is worse (p < 0.05 "
    "after Holm's correction for the number of systems, and a 95 % interval of the difference that is clear of zero)"
)


def metric_look(metric: str) -> MetricLook:
    """Return how ``metric`` is shown; of several models of one kind, ``comet:XCOMET-XL``, the model is the name.

    A figure that is no metric of translation, such as ``nll``, has the name that it is known by.
    """
    kind, _, model = metric.partition(":")
    look = METRIC_LOOKS.get(kind, MetricLook(metric))
    return replace(look, label=model) if model else look


def metric_label(metric: str) -> str:
    """Return the name of a metric; an arrow says that lower is better."""
    look = metric_look(metric)
    return look.label if look.higher_is_better else f"{look.label} ↓"


def best_of(metric: str, values: Iterable[float]) -> float:
    """Return the best of some scores."""
    return max(values) if metric_look(metric).higher_is_better else min(values)


def significance_mark(metric: str, difference: float, significant: bool, digits: int) -> str:
    """Return † for significantly better, ▾ for significantly worse, nothing where the shown difference is zero.

    Args:
        metric: which one, for its scale and whether higher is better.
        difference: system minus baseline, on the metric's own scale.
        significant: what ``evaluation.significance.is_significant`` says.
        digits: how many decimals are shown.
    """
    look = metric_look(metric)
    if not significant or round(difference * look.scale, digits) == 0:
        return ""
    return BETTER if (difference > 0) == look.higher_is_better else WORSE


def guard_is_alarming(name: str, value: float) -> bool:
    """Tell whether a guard's share, or the length ratio, deserves a look."""
    if name == "length_ratio":
        return not LENGTH_RATIOS[0] <= value <= LENGTH_RATIOS[1]
    return value > GUARD_LIMITS[name]


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """Return a figure with a real minus, and none before a zero."""
    rounded = round(value, digits) + 0.0  # −0.0 + 0.0 is 0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def score_text(metric: str, value: float, sign: bool = False) -> str:
    """Return a score, or a difference of scores, as its metric is shown."""
    look = metric_look(metric)
    return number(value * look.scale, look.digits, sign)


def p_text(p: float | None) -> str:
    """Return p with three digits; the bootstrap of 1,000 samples knows nothing below 1/1001."""
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"
