"""The study's cells, grouped: one system at one point of the matrix, over its seeds; and each at its best value."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.arguments import STAGE, DistillationArguments
from llamafactory_sekd.reporting.metric_labels import AVERAGE, metric_label


# Keys of the paper that have a letter.
SYMBOLS = {"kd_gamma": "Γ", "kd_topk": "K", "kd_beta": "β", "kd_lambda": "λ", "kd_temperature": "T"}
Cell = Mapping[str, Any]
Point = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Summary:
    """A mean over ``count`` seeds and the sample standard deviation, None for a single one."""

    mean: float
    sd: float | None
    count: int


def summarize(values: Iterable[float | None]) -> Summary | None:
    """Return the summary of the values that are known, None where there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Summary(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True, eq=False)
class Group:
    """A system at a point of the matrix. ``cells`` is by seed; an evaluated model has seed None."""

    system: str
    point: Point
    cells: dict[int | None, Cell]

    @property
    def config(self) -> Mapping[str, Any]:
        """The training YAML of the first seed; empty for a model that nobody trained."""
        return next(iter(self.cells.values())).get("config") or {}

    @property
    def objective(self) -> str | None:
        """The distillation objective, a mapping as text; None for another stage."""
        if self.config.get("stage") != STAGE:
            return None
        return str(self.config.get("kd_loss", DistillationArguments.kd_loss))

    @property
    def trained(self) -> bool:
        """Tell whether the group was trained, and not only evaluated."""
        return None not in self.cells

    def value(self, key: str) -> Any:
        """Return the group's value of a key of the matrix, None where the key has no effect on it."""
        return dict(self.point).get(key)

    def scores(self, column: str, metric: str) -> Summary | None:
        """Summarize a score over the seeds; ``column`` is a direction or ``average``."""
        return summarize(cell["scores"].get(column, {}).get(metric) for cell in self.cells.values())

    def similarity(self, column: str) -> Summary | None:
        """Summarize BLEU against the teacher's translations over the seeds."""
        return summarize((cell["similarity"] or {}).get(column) for cell in self.cells.values())

    def validation(self, metric: str) -> Summary | None:
        """Summarize a validation metric over the seeds."""
        return summarize((cell["validation"] or {}).get(metric) for cell in self.cells.values())

    def name(self, without: Sequence[str] = ()) -> str:
        """Return the system with the point's values, those of the keys ``without`` aside."""
        values = [f"{symbol(key)} = {shown(value)}" for key, value in self.point if key not in without]
        return ", ".join([self.system, *values])


@dataclass(frozen=True)
class Study:
    """All that was measured. ``models`` were evaluated only; ``missing`` names cells without scores."""

    results: Mapping[str, Any]
    root: Path
    keys: tuple[str, ...]
    groups: tuple[Group, ...]
    models: tuple[Group, ...]
    missing: tuple[str, ...]

    @property
    def spec(self) -> Mapping[str, Any]:
        """Return the study file as it ran."""
        return self.results["spec"]

    @property
    def directions(self) -> tuple[str, ...]:
        """Return the directions of the evaluation."""
        return tuple(self.results["directions"])

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the directions and, where there are several, the average."""
        return (*self.directions, AVERAGE) if len(self.directions) > 1 else self.directions

    @property
    def last_column(self) -> str:
        """Return what represents the entire test: the average, or the only direction."""
        return self.columns[-1]

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        """Return BLEU and COMET as the paper shows them, chrF2 in COMET's place where there is none."""
        groups = self.groups or self.models
        known = [
            one for one in self.results["metrics"] if any(group.scores(self.last_column, one) for group in groups)
        ]
        return tuple(metric for metric in known if metric != "chrf" or "comet" not in known)

    def keys_of(self, groups: Iterable[Group]) -> tuple[str, ...]:
        """Return the keys of the matrix that have an effect on any of the groups."""
        found = {key for group in groups for key, _ in group.point}
        return tuple(key for key in self.keys if key in found)

    @property
    def baseline(self) -> str | None:
        """Return the name of the system that differences are against."""
        return self.spec.get("baseline")

    @property
    def teacher(self) -> str | None:
        """Return the name of the model that similarity is measured to."""
        return self.spec.get("teacher")

    @property
    def systems(self) -> tuple[str, ...]:
        """The systems with a result, in the study's order, those that were evaluated only at the end."""
        return tuple(dict.fromkeys(group.system for group in (*self.groups, *self.models)))

    def baseline_of(
        self, group: Group, among: Sequence[Group] | None = None, free: Sequence[str] = ()
    ) -> Group | None:
        """Return the baseline at ``group``'s point: it must agree on every key that both have, ``free`` ones aside.

        None for the baseline itself, and where ``among`` (default: all groups) holds none or several that agree.
        """
        if self.baseline is None or group.system == self.baseline:
            return None
        point = {key: value for key, value in group.point if key not in free}
        fitting = [
            other
            for other in (*(self.groups if among is None else among), *self.models)
            if other.system == self.baseline and all(point.get(key, value) == value for key, value in other.point)
        ]
        return fitting[0] if len(fitting) == 1 else None


def read_study(results: Mapping[str, Any], root: Path) -> Study:
    """Group the cells of results.json, which is in ``root``.

    A cell counts once its scores are there, or without an evaluation once it is trained; the others are missing.
    """
    groups: dict[str, Group] = {}
    for cell in results["cells"]:
        if cell["scores"] is not None:
            point = tuple(cell["axes"].items())
            group = groups.setdefault(json.dumps([cell["system"], point]), Group(cell["system"], point, {}))
            group.cells[cell["seed"]] = cell
    models = [Group(model["name"], (), {None: model}) for model in results["models"] if model["scores"]]
    keys = tuple(results["spec"].get("matrix") or ())
    return Study(results, root, keys, tuple(groups.values()), tuple(models), tuple(_missing(results)))


def _missing(results: Mapping[str, Any]) -> Iterable[str]:
    for cell in results["cells"]:
        if cell["scores"] is None:
            name = Group(cell["system"], tuple(cell["axes"].items()), {}).name()
            yield f"{name}, seed {cell['seed']} ({'not evaluated' if cell['training'] else 'not trained'})"
    yield from (f"{model['name']} (not evaluated)" for model in results["models"] if not model["scores"])


def paired_cells(group: Group, baseline: Group) -> list[tuple[Cell, Cell]]:
    """Return the cells of both with the same seed; a model without seeds is the partner of every seed."""
    if not group.trained or not baseline.trained:
        return list(itertools.product(group.cells.values(), baseline.cells.values()))
    return [(cell, baseline.cells[seed]) for seed, cell in group.cells.items() if seed in baseline.cells]


def short_names(groups: Sequence[Group]) -> dict[Group, str]:
    """Name groups by what tells them apart: their systems or, of a single system, their points."""
    systems = {group.system for group in groups}
    if len(systems) == len(groups):
        return {group: group.system for group in groups}
    keys = {key for group in groups for key, _ in group.point}
    same = [key for key in keys if len({str(group.value(key)) for group in groups}) == 1]
    names = {group: group.name(without=same) for group in groups}
    if len(systems) > 1:
        return names
    return {group: name.removeprefix(f"{group.system}, ") for group, name in names.items()}


def symbol(key: str) -> str:
    """Return the paper's letter of a key, or the key."""
    return SYMBOLS.get(key, key)


def shown(value: Any) -> str:
    """Return a value of the matrix as a reader writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_number(value: Any) -> bool:
    """Tell whether a value is a number; a boolean is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
