"""How metrics and guards are named, scaled and marked, the same in every report."""

from __future__ import annotations


METRIC_LABELS = {"bleu": "BLEU", "chrf": "chrF2", "comet": "COMET"}
# COMET is shown times 100, as papers do; results.json keeps the library's own scale.
METRIC_SCALES = {"bleu": 1.0, "chrf": 1.0, "comet": 100.0}
GUARD_LABELS = {
    "empty": "empty",
    "wrong_language": "wrong language",
    "repetition": "repetition loop",
    "hit_max_new_tokens": "hit max_new_tokens",
    "length_ratio": "length ratio",
}
# A share above its limit is highlighted; so is a length ratio outside of LENGTH_RATIOS.
GUARD_LIMITS = {"empty": 0.001, "wrong_language": 0.02, "repetition": 0.005, "hit_max_new_tokens": 0.01}
LENGTH_RATIOS = (0.8, 1.25)
AVERAGE = "average"
BETTER, WORSE = "†", "▾"
MARKS = f"{BETTER} marks a system that is significantly better than the baseline, {WORSE} one that is worse (p < 0.05)"


def significance_mark(difference: float, significant: bool, digits: int, higher_is_better: bool = True) -> str:
    """Return † for significantly better, ▾ for significantly worse, nothing where the shown difference is zero.

    Args:
        difference: system minus baseline, on the scale that is shown.
        significant: whether the test rejects that both are equal.
        digits: how many decimals are shown.
        higher_is_better: False for metrics that count errors.
    """
    if not significant or round(difference, digits) == 0:
        return ""
    return BETTER if (difference > 0) == higher_is_better else WORSE


def guard_is_alarming(name: str, value: float) -> bool:
    """Tell whether a guard's share, or the length ratio, deserves a look."""
    if name == "length_ratio":
        return not LENGTH_RATIOS[0] <= value <= LENGTH_RATIOS[1]
    return value > GUARD_LIMITS[name]


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """Return a figure with a real minus, and none before a zero."""
    rounded = round(value, digits) + 0.0  # −0.0 + 0.0 is 0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def p_text(p: float | None) -> str:
    """Return p with three digits; the bootstrap of 1,000 samples knows nothing below 1/1001."""
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"
