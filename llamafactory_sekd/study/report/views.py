"""What the sections share: which groups represent the systems, their baselines and looks, and tables of groups."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from rich.console import Console
from rich.progress import track

from llamafactory_sekd.errors import SekdError
from llamafactory_sekd.evaluation.evaluation_tables import noticed_entry
from llamafactory_sekd.evaluation.significance import holm, relations, share
from llamafactory_sekd.reporting.document import NOTHING, Column, Entry, Row, Table
from llamafactory_sekd.reporting.figures import BASELINE, SOFT, Look, distinct_looks
from llamafactory_sekd.reporting.metric_labels import (
    best_of,
    metric_label,
    metric_look,
    number,
    p_text,
    significance_mark,
)
from llamafactory_sekd.study.report.cells import (
    Difference,
    Group,
    PairedBootstrap,
    Study,
    Summary,
    Texts,
    is_number,
    shown,
    symbol,
)


# Decimals of scores and differences.
DIGITS = 2
# So many lines can still be told apart in one plot.
MOST_LINES = 9
# Heading -> (metric of the last evaluation on the validation text, digits, factor)
LAST_METRICS = {
    "NLL": ("nll", 4, 1.0),
    "agreement (%)": ("eval_kd/agreement", 2, 100.0),
    "KL(p ‖ q)": ("eval_kd/teacher_kl", 4, 1.0),
    "difficulty d": ("eval_kd/difficulty", 4, 1.0),
    "hard tokens (%)": ("eval_kd/hard_ratio", 2, 100.0),
    "loss": ("eval_loss", 4, 1.0),
}
# A group, a direction or the average, a metric -> the difference to the baseline, None where there is none.
Compare = Callable[[Group, str, str], Difference | None]


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


@dataclass(frozen=True)
class Views:
    """A study as its report looks at it."""

    study: Study

    @cached_property
    def chosen(self) -> tuple[Choice, ...]:
        """Return each system at its own best value, where one was selected."""
        return choices(self.study)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups that represent the systems: each at its own best value, or all where nothing is selected."""
        return tuple(choice.group for choice in self.chosen) or self.study.groups

    def baseline_of(self, group: Group) -> Group | None:
        """Return the baseline of one of :attr:`groups`, itself at its own best value."""
        return chosen_baseline(self.study, self.chosen, group) if self.chosen else self.study.baseline_of(group)

    @property
    def remaining_keys(self) -> tuple[str, ...]:
        """The keys of the matrix that no selection has settled."""
        return tuple(key for key in self.study.keys if not self.chosen or key != self.chosen[0].key)

    @cached_property
    def looks(self) -> dict[str, Look]:
        """Return color, marker and line of each system: the baseline black, the others colors in the study's order."""
        given = distinct_looks()
        special = {self.study.teacher: Look(SOFT, "", ":"), self.study.baseline: Look(BASELINE, "o", "-")}
        systems = dict.fromkeys([*self.study.spec["systems"], *self.study.systems])
        return {system: special.get(system) or next(given) for system in systems}

    @cached_property
    def texts(self) -> Texts:
        """Return the translations and references."""
        return Texts(self.study)

    @cached_property
    def unreadable(self) -> str | None:
        """Why the translations or the test set cannot be read, None where all can.

        This takes the statistics of all sentences, the long part of a report, and shows how far it is.
        """
        cells = [cell for group in (*self.study.groups, *self.study.models) for cell in group.cells.values()]
        work = [(cell, direction) for cell in cells for direction in self.study.directions]
        try:
            console = Console(stderr=True)
            quiet = not console.is_terminal
            for cell, direction in track(work, "Report", console=console, transient=True, disable=quiet):
                for metric in {"bleu", *self.study.shown_metrics}:
                    if cell["scores"][direction].get(metric) is not None:
                        self.texts.statistics(cell, direction, metric)
        except SekdError as error:
            return str(error)
        return None

    @cached_property
    def _bootstrap(self) -> PairedBootstrap:
        return PairedBootstrap(self.texts, self.study.directions)

    def at_own_best(self, group: Group, column: str, metric: str) -> Difference | None:
        """Compare a group with its baseline, both at their own best value where one was selected."""
        baselines = {one: self.baseline_of(one) for one in (*self.study.models, *self.groups)}
        return self._corrected("own best", baselines, column, metric).get(group)

    def at_equal_settings(self, group: Group, column: str, metric: str) -> Difference | None:
        """Compare a group with the baseline at the same point of the matrix."""
        baselines = {one: self.study.baseline_of(one) for one in (*self.study.models, *self.study.groups)}
        return self._corrected("equal settings", baselines, column, metric).get(group)

    def _corrected(
        self, table: str, baselines: Mapping[Group, Group | None], column: str, metric: str
    ) -> dict[Group, Difference]:
        """Return the differences of a column of a ``table``, with p corrected for the number of its comparisons."""
        key = (table, column, metric)
        if key not in self._columns:
            compared = {group: self.between(group, other, column, metric) for group, other in baselines.items()}
            found = {group: one for group, one in compared.items() if one is not None}
            corrected = holm({group: one.p for group, one in found.items()})
            self._columns[key] = {group: replace(one, p_holm=corrected[group]) for group, one in found.items()}
        return self._columns[key]

    @cached_property
    def _columns(self) -> dict[tuple[str, str, str], dict[Group, Difference]]:
        return {}

    def between(self, group: Group, other: Group | None, column: str, metric: str) -> Difference | None:
        """Compare any two groups; None where there is no other one, or the texts cannot be read."""
        if other is None or self.unreadable is not None:
            return None
        return self._bootstrap.compare(group, other, column, metric)


def entry(summary: Summary | None, digits: int = DIGITS, scale: float = 1.0) -> Entry:
    """Return mean ± sd; the sd is left out for a single seed."""
    if summary is None:
        return NOTHING
    spread = number(summary.sd * scale, digits) if summary.sd is not None else ""
    return Entry(number(summary.mean * scale, digits), spread)


def group_table(
    study: Study,
    groups: Sequence[Group],
    columns: Iterable[Column],
    entries: Callable[[Group], Iterable[Entry] | None],
) -> Table:
    """Return a row per group, named by its system and its values of the matrix; none where ``entries`` gives None."""
    keys = study.keys_of(groups)
    roles = {study.baseline: "baseline", study.teacher: "teacher"}
    rows = []
    for group in groups:
        point, found = dict(group.point), entries(group)
        names = (group.system, *(shown(point[key]) if key in point else "" for key in keys))
        if found is not None:
            rows.append(Row(names, tuple(found), roles.get(group.system, "")))
    return Table(("system", *map(symbol, keys)), tuple(columns), tuple(rows))


def score_table(study: Study, groups: Sequence[Group], compare: Compare) -> Table:
    """Return the paper's Table 1: directions by metrics, the average last, † by ``compare``; the best is bold."""
    pairs = [(column, metric) for column in study.columns for metric in study.shown_metrics]
    best = {pair: _best(study, groups, *pair) for pair in pairs}

    def entries(group: Group) -> Iterable[Entry]:
        for pair in pairs:
            cell = _score(group, *pair, compare(group, *pair))
            yield replace(cell, best=group in best[pair])

    return group_table(study, groups, (Column(metric_label(metric), column) for column, metric in pairs), entries)


def _score(group: Group, column: str, metric: str, difference: Difference | None) -> Entry:
    scale = metric_look(metric).scale
    cell = entry(group.scores(column, metric), scale=scale)
    if difference is None:
        return cell
    interval = f"{number(difference.low * scale)} to {number(difference.high * scale)}"
    tested = f"p = {p_text(difference.p)}, corrected {p_text(difference.p_holm)}"
    return replace(
        cell,
        mark=mark_of(difference, metric),
        small=number(difference.value * scale, sign=True),
        hint=f"95 % interval of the difference {interval}, {tested}",
    )


def mark_of(difference: Difference, metric: str) -> str:
    """Return † or ▾ or nothing, as `eval` has it."""
    return significance_mark(metric, difference.value, difference.significant, DIGITS)


def _best(study: Study, groups: Sequence[Group], column: str, metric: str) -> list[Group]:
    """Return who leads a column; the teacher takes no part, for it nearly always wins."""
    means = {
        group: summary.mean
        for group in groups
        if group.system != study.teacher and (summary := group.scores(column, metric)) is not None
    }
    return leaders(means, partial(best_of, metric))


def leaders(means: Mapping[Group, float], best: Callable[[Collection[float]], float]) -> list[Group]:
    """Return the groups with the ``best`` of several means; none of a single one."""
    top = best(means.values()) if len(means) > 1 else None
    return [group for group, mean in means.items() if mean == top]


def difference_table(study: Study, groups: Sequence[Group], compare: Compare) -> Table | None:
    """Return difference, interval, p and the seeds that agree, in the average; None without any difference."""
    metrics = study.shown_metrics
    found = {group: [compare(group, study.last_column, metric) for metric in metrics] for group in groups}

    def entries(group: Group) -> list[Entry] | None:
        pairs = zip(found[group], metrics, strict=True)
        return [one for pair in pairs for one in _difference(*pair)] if any(found[group]) else None

    names = ("difference", "95 % interval", "p", "seeds above 0")
    columns = (Column(name, metric_label(metric)) for metric in metrics for name in names)
    table = group_table(study, groups, columns, entries)
    return table if table.rows else None


def _difference(difference: Difference | None, metric: str) -> tuple[Entry, ...]:
    if difference is None:
        return (NOTHING,) * 4
    scale = metric_look(metric).scale
    above = sum(value > 0 for value in difference.seeds)
    return (
        Entry(number(difference.value * scale, sign=True), mark=mark_of(difference, metric)),
        Entry(f"{number(difference.low * scale)} to {number(difference.high * scale)}"),
        Entry(p_text(difference.p_holm), small=p_text(difference.p)),
        Entry(f"{above} of {len(difference.seeds)}"),
    )


def noticed_table(study: Study, groups: Sequence[Group], compare: Compare) -> Table | None:
    """Return how many people would notice each difference, as `eval` has it; None where no metric has a relation."""
    about = study.results["test_set"] or {}
    known = relations(study.shown_metrics, about.get("bleu_tokenizer"), about.get("metric_models") or {})
    pairs = [(column, metric) for column in study.columns for metric in known]
    found = {group: [compare(group, *pair) for pair in pairs] for group in groups}

    def noticed(difference: Difference | None, metric: str) -> Entry:
        return noticed_entry(
            None if difference is None else share(known[metric], difference.value * metric_look(metric).scale)
        )

    def entries(group: Group) -> list[Entry] | None:
        own = [noticed(difference, metric) for (_, metric), difference in zip(pairs, found[group], strict=True)]
        return own if any(found[group]) else None

    table = group_table(study, groups, (Column(metric_label(metric), column) for column, metric in pairs), entries)
    return table if table.rows else None


def summary_table(
    study: Study, groups: Sequence[Group], columns: Mapping[str, Callable[[Group], Entry]]
) -> Table | None:
    """Return a table of ``columns`` (name -> a group's figure) without those that nobody has; None without any."""
    found = {name: {group: figure(group) for group in groups} for name, figure in columns.items()}
    kept = {name: of for name, of in found.items() if any(one != NOTHING for one in of.values())}

    def entries(group: Group) -> list[Entry] | None:
        own = [of[group] for of in kept.values()]
        return own if any(one != NOTHING for one in own) else None

    return group_table(study, groups, map(Column, kept), entries) if kept else None
