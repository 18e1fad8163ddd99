"""Do people notice a difference of scores? The published relation of a metric's difference and people's verdict.

Kocmi, Zouhar, Federmann and Post, "Navigating the Metrics Maze: Reconciling Score Magnitudes and Accuracies" (ACL
2024), held differences of metrics against human judgments of 6,530 pairs of systems. Their curve (section 3.3) is

    share(x) = φ₁ / (1 + exp(-φ₂ · x))

of the pairs with a difference of x that people put in the same order. 50 % is a coin toss; each metric has a share,
φ₁, that it never passes. The figures are those of the authors' tool, https://github.com/kocmitom/MT-Thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from llamafactory_sekd.evaluation.evaluation_settings import Settings
from llamafactory_sekd.evaluation.scores import BleuTokenizer, model_name
from llamafactory_sekd.reporting.document import NOTHING, Entry, Section, Table
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


NOTE = (
    "Of a hundred pairs of systems with the same difference, the number that people put in the same order (Kocmi et "
    "al., 2024, over 94 languages); 50 % is a coin toss. It says nothing of this test set's sentences, as p does; of "
    "BLEU and chrF2 it holds where systems are related, as students of one kind."
)


def relations(
    metrics: Iterable[str], bleu_tokenizer: BleuTokenizer, models: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """Return the relation of each of the ``metrics`` that has one.

    Args:
        metrics: their keys.
        bleu_tokenizer: BLEU's, where the evaluation names one: the relation is that of the default.
        models: name or path of each metric that is a model.
    """
    known = {}
    for metric in metrics:
        if metric in models:
            known[metric] = MODEL_RELATIONS.get(model_name(models[metric]))
        elif metric != "bleu" or bleu_tokenizer is None:
            known[metric] = RELATIONS.get(metric)
    return {metric: relation for metric, relation in known.items() if relation is not None}


def share(relation: tuple[float, float], difference: float) -> float:
    """Return the share (0 to 1) of pairs with that ``difference`` (0 to 100) that people put in the same order."""
    limit, slope = relation
    return limit / (1 + math.exp(-slope * abs(difference))) / 100


def noticed(systems: Mapping[str, Mapping[str, Any]], settings: Settings) -> dict[str, dict[str, dict[str, float]]]:
    """Return ``{system: {direction or average: {metric: share}}}`` against the baseline, where a relation is known."""
    known = relations(settings.metrics, settings.bleu_tokenizer, settings.models)
    if settings.baseline is None or not known:
        return {}
    base = systems[settings.baseline]["scores"]
    return {
        name: {
            column: {
                metric: share(relation, (scores[metric] - base[column][metric]) * metric_look(metric).scale)
                for metric, relation in known.items()
                if scores[metric] is not None and base[column][metric] is not None
            }
            for column, scores in entry["scores"].items()
        }
        for name, entry in systems.items()
        if name != settings.baseline
    }


def noticed_entry(found: float | None) -> Entry:
    """Return a share as a report shows it; nothing where there is none."""
    if found is None:
        return NOTHING
    return Entry(f"{100 * found:.0f} %" if found > 0.5 else "≤ 50 %")


def noticed_section(table: Table) -> Section:
    """Return the section of a report about it: a row for each system, a column for each metric with a relation."""
    return Section("Noticed by people", NOTE, tables=(table,), main=True)
