"""The scores of parts of a test set: the lengths of its sources and, where it knows them, its domains and documents.

A corpus score is made of sums over sentences, so a part is scored by the sums of its own: exactly as if it were a test
set by itself.
"""

from __future__ import annotations

import statistics as moments
from collections.abc import Mapping, Sequence
from typing import Any

from llamafactory_sekd.data.languages import Direction, script_of
from llamafactory_sekd.data.testsets import TestSet
from llamafactory_sekd.evaluation.asking import documents_in
from llamafactory_sekd.evaluation.scores import UNSPACED_SCRIPTS
from llamafactory_sekd.evaluation.significance import Statistics


# The longest source of each band, in words.
BANDS = {"1–10 words": 10, "11–20": 20, "21–30": 30, "31–50": 50}
REST = "51 or more"

# metric, then system, to the statistics of each direction.
All = Mapping[str, Mapping[str, Sequence[Statistics]]]
Places = Sequence[int]


def by_part(test_sets: Mapping[Direction, TestSet], found: All) -> dict[str, dict[str, Any]]:
    """Return what results.json says of parts: ``by_domain``, ``by_document`` and ``by_length``, each by direction.

    ``by_domain`` and ``by_length`` map a part to ``{"sentences": …, "scores": {system: {metric: …}}}``;
    ``by_document`` holds ``documents``, their number, and ``scores`` as mean and standard deviation over them.
    """
    domains: dict[str, Any] = {}
    documents: dict[str, Any] = {}
    lengths: dict[str, Any] = {}
    for index, (direction, test_set) in enumerate(test_sets.items()):
        if test_set.domains:
            domains[str(direction)] = _named(_places(test_set.domains), found, index)
        lengths[str(direction)] = _named(_in_order(_places(_bands(test_set.sources, direction))), found, index)
        named = [places for places in documents_in(test_set.documents) if test_set.documents[places[0]]]
        if len(named) > 1:
            documents[str(direction)] = {"documents": len(named), "scores": _over(named, found, index)}
    return {"by_domain": domains, "by_document": documents, "by_length": lengths}


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        places.setdefault(name, []).append(index)
    return places


def _in_order(places: dict[str, list[int]]) -> dict[str, list[int]]:
    return {band: places[band] for band in (*BANDS, REST) if band in places}


def _bands(sources: Sequence[str], direction: Direction) -> list[str]:
    unspaced = script_of(direction.source) in UNSPACED_SCRIPTS
    lengths = [-(-len("".join(source.split())) // 2) if unspaced else len(source.split()) for source in sources]
    return [next((band for band, longest in BANDS.items() if length <= longest), REST) for length in lengths]


def _score(statistics: Statistics, places: Places) -> float:
    return statistics.score(statistics.rows[list(places)].sum(0))


def _named(parts: Mapping[str, Places], found: All, index: int) -> dict[str, dict[str, Any]]:
    names = list(next(iter(found.values()), {}))
    return {
        part: {
            "sentences": len(places),
            "scores": {
                name: {metric: _score(by_system[name][index], places) for metric, by_system in found.items()}
                for name in names
            },
        }
        for part, places in parts.items()
    }


def _over(documents: Sequence[Places], found: All, index: int) -> dict[str, dict[str, dict[str, float]]]:
    result: dict[str, dict[str, dict[str, float]]] = {}
    for metric, by_system in found.items():
        for name, statistics in by_system.items():
            scores = [_score(statistics[index], places) for places in documents]
            entry = {"mean": moments.fmean(scores), "sd": moments.stdev(scores)}
            result.setdefault(name, {})[metric] = entry
    return result
