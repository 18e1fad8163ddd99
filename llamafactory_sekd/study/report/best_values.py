"""Each system at its own best value of a key, as the study chose it on the validation set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamafactory_sekd.reporting.metric_labels import metric_label
from llamafactory_sekd.study.report.cells import Group, Study, is_number


@dataclass(frozen=True)
class Choice:
    """A system at a point of the other keys, with the best value of ``key``.

    ``tried`` holds (value, validation metric as a mean over the seeds) of every value that was trained; it is empty
    where the key has no effect on the system, and nothing was chosen.
    """

    group: Group
    key: str
    tried: tuple[tuple[Any, float], ...] = ()

    @property
    def value(self) -> Any:
        """Return the chosen value."""
        return self.group.value(self.key)

    @property
    def at_the_edge(self) -> bool:
        """Tell whether the best value is the smallest or the largest tried: a better one may lie beyond."""
        values = [value for value, _ in self.tried]
        return len(values) > 1 and all(map(is_number, values)) and self.value in (min(values), max(values))


def choices(study: Study) -> tuple[Choice, ...]:
    """Return the choices in the study's order; none without `select`, and none whose best value has no scores yet."""
    select = study.spec.get("select")
    if not select:
        return ()
    rows = {_identity(row["system"], row["axes"]): row for row in study.results["selection"]}
    chosen = []
    for group in study.groups:
        row = rows.get(_identity(group.system, {k: v for k, v in group.point if k != select["key"]}))
        if select["key"] not in dict(group.point):
            chosen.append(Choice(group, select["key"]))
        elif row is not None and row["value"] is not None and row["value"] == group.value(select["key"]):
            tried = tuple((one["value"], one["mean"]) for one in row["by_value"] if one["mean"] is not None)
            chosen.append(Choice(group, select["key"], tried))
    return tuple(chosen)


def chosen_baseline(study: Study, chosen: Sequence[Choice], group: Group) -> Group | None:
    """Return the baseline at *its* best value, at ``group``'s point of the other keys."""
    rivals = [choice.group for choice in chosen if choice.group.system == study.baseline]
    return study.baseline_of(group, rivals, free=[choice.key for choice in chosen][:1])


def _identity(system: str, axes: Mapping[str, Any]) -> str:
    return json.dumps([system, axes], sort_keys=True)


def selected_by(study: Study) -> str:
    """Return how the choice was made, in words."""
    row = study.results["selection"][0]
    metric = metric_label(row["metric"])
    return f"{'largest' if row['mode'] == 'max' else 'smallest'} {metric} on the validation set"
