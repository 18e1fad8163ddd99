"""The study's cells, grouped: one system at one point of the matrix, over its seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.arguments import STAGE, DistillationArguments


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
