"""Metric interference: a metric that chose a system's training text likes what it chose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llamafactory_sekd.data.products import metrics_of_model
from llamafactory_sekd.evaluation.evaluation_settings import System


# How a metric's signature begins, and the metrics of an evaluation that resemble it.
_FAMILIES = {"chrF": ("chrf", "bleu"), "comet": ("comet",)}


def interfering(systems: Sequence[System], metrics: Sequence[str]) -> dict[str, list[str]]:
    """Return, for each system whose training text was chosen by a metric, the ``metrics`` of the same family."""
    found: dict[str, list[str]] = {}
    for system in systems:
        model = system.model or {}
        places = [str(model[key]) for key in ("adapter_name_or_path", "model_name_or_path") if model.get(key)]
        signatures = [text for place in places for text in metrics_of_model(Path(place)).values()]
        chose = " + ".join(signatures)
        own = [
            metric
            for metric in metrics
            if any(start in chose and any(part in metric for part in family) for start, family in _FAMILIES.items())
        ]
        if own:
            found[system.name] = own
    return found
