"""Do people notice a difference of scores? The published relation of a metric's difference and people's verdict.

Kocmi, Zouhar, Federmann and Post, "Navigating the Metrics Maze: Reconciling Score Magnitudes and Accuracies" (ACL
2024), held differences of metrics against human judgments of 6,530 pairs of systems. Their curve (section 3.3) is

    share(x) = φ₁ / (1 + exp(-φ₂ · x))

of the pairs with a difference of x that people put in the same order. 50 % is a coin toss; each metric has a share,
φ₁, that it never passes. The figures are those of the authors' tool, https://github.com/kocmitom/MT-Thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llamafactory_sekd.evaluation.evaluation_settings import Settings
from llamafactory_sekd.evaluation.segment_scores import model_name
from llamafactory_sekd.reporting.metric_labels import metric_look


# φ₁ in percent and φ₂, of scores from 0 to 100: metrics of sacrebleu with its defaults, and models by name.
RELATIONS = {
    "bleu": (88.33333333333225, 0.9663926931178954),
    "chrf": (92.999999999972, 1.1142732157139852),
    "spbleu": (90.99999999998793, 0.8079046528617078),
}
MODEL_RELATIONS = {
    "wmt20-comet-da": (97.33333333332897, 0.7266990738678005),
    "wmt22-comet-da": (96.22374133884283, 2.8359194570556636),
    "wmt22-cometkiwi-da": (98.88141616584615, 2.719280643871758),
    "wmt23-cometkiwi-da-xxl": (96.23167242471065, 1.2826577343149304),
    "XCOMET-XL": (96.56738237041118, 1.4535595865214588),
    "XCOMET-XXL": (98.93432477039522, 1.1629533711748128),
}


def share(relation: tuple[float, float], difference: float) -> float:
    """Return the share (0 to 1) of pairs with that ``difference`` (0 to 100) that people put in the same order."""
    limit, slope = relation
    return limit / (1 + math.exp(-slope * abs(difference))) / 100


def noticed(systems: Mapping[str, Mapping[str, Any]], settings: Settings) -> dict[str, dict[str, dict[str, float]]]:
    """Return ``{system: {direction or average: {metric: share}}}`` against the baseline, where a relation is known."""
    relations = {metric: relation for metric in settings.metrics if (relation := _relation(metric, settings))}
    if settings.baseline is None or not relations:
        return {}
    base = systems[settings.baseline]["scores"]
    return {
        name: {
            column: {
                metric: share(relation, (scores[metric] - base[column][metric]) * metric_look(metric).scale)
                for metric, relation in relations.items()
                if scores[metric] is not None and base[column][metric] is not None
            }
            for column, scores in entry["scores"].items()
        }
        for name, entry in systems.items()
        if name != settings.baseline
    }


def _relation(metric: str, settings: Settings) -> tuple[float, float] | None:
    if metric == "bleu" and settings.bleu_tokenizer is not None:
        return None  # the relation is that of the default tokenizer
    location = settings.models.get(metric)
    return MODEL_RELATIONS.get(model_name(location)) if location is not None else RELATIONS.get(metric)
