"""The tables of scores: the paper's Table 1, and the differences behind its †."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from llamafactory_sekd.evaluation.noticed import noticed_entry, relations, share
from llamafactory_sekd.reporting.document import NOTHING, Column, Entry, Row, Table
from llamafactory_sekd.reporting.metric_labels import (
    AVERAGE,
    best_of,
    metric_label,
    metric_look,
    number,
    p_text,
    significance_mark,
)
from llamafactory_sekd.study.report.cells import Group, Study, Summary, shown, symbol
from llamafactory_sekd.study.report.paired import Difference


# Decimals of scores and differences.
DIGITS = 2
# A group, a direction or the average, a metric -> the difference to the baseline, None where there is none.
Compare = Callable[[Group, str, str], Difference | None]


def entry(summary: Summary | None, digits: int = 2, scale: float = 1.0) -> Entry:
    """Return mean ± sd; the sd is left out for a single seed."""
    if summary is None:
        return NOTHING
    spread = number(summary.sd * scale, digits) if summary.sd is not None else ""
    return Entry(number(summary.mean * scale, digits), spread)


def columns_of(study: Study) -> tuple[str, ...]:
    """Return the directions and, where there are several, the average."""
    return (*study.directions, AVERAGE) if len(study.directions) > 1 else study.directions


def last_column(study: Study) -> str:
    """Return what represents the entire test: the average, or the only direction."""
    return columns_of(study)[-1]


def shown_metrics(study: Study) -> tuple[str, ...]:
    """Return BLEU and COMET as the paper does, chrF2 in COMET's place where there is none."""
    column = last_column(study)
    groups = study.groups or study.models
    known = [metric for metric in study.results["metrics"] if any(group.scores(column, metric) for group in groups)]
    return tuple(metric for metric in known if metric != "chrf" or "comet" not in known)


def rows_of(
    study: Study, groups: Iterable[Group], keys: Sequence[str], entries: Callable[[Group], Iterable[Entry]]
) -> tuple[Row, ...]:
    """Return one row per group, named by its system and its values of ``keys``."""
    return tuple(
        Row(
            (group.system, *(shown(group.value(key)) if key in dict(group.point) else "" for key in keys)),
            tuple(entries(group)),
            role_of(study, group),
        )
        for group in groups
    )


def role_of(study: Study, group: Group) -> str:
    """Return `baseline` or `teacher` where a group has that part, else nothing."""
    return {study.baseline: "baseline", study.teacher: "teacher"}.get(group.system, "")


def heads_of(keys: Sequence[str]) -> tuple[str, ...]:
    """Return the heads of a table's first columns."""
    return ("system", *map(symbol, keys))


def score_table(study: Study, groups: Sequence[Group], keys: Sequence[str], compare: Compare) -> Table:
    """Return the paper's Table 1: directions by metrics, the average last, † by ``compare``; the best is bold."""
    pairs = [(column, metric) for column in columns_of(study) for metric in shown_metrics(study)]
    best = {pair: _best(study, groups, *pair) for pair in pairs}

    def entries(group: Group) -> Iterable[Entry]:
        for pair in pairs:
            cell = _score(group, *pair, compare(group, *pair))
            yield replace(cell, best=group in best[pair])

    columns = tuple(Column(metric_label(metric), column) for column, metric in pairs)
    return Table(heads_of(keys), columns, rows_of(study, groups, keys, entries))


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
        group.name(): summary.mean
        for group in groups
        if group.system != study.teacher and (summary := group.scores(column, metric)) is not None
    }
    top = best_of(metric, means.values()) if means else None
    return [group for group in groups if len(means) > 1 and means.get(group.name()) == top]


def difference_table(study: Study, groups: Sequence[Group], keys: Sequence[str], compare: Compare) -> Table | None:
    """Return difference, interval, p and the seeds that agree, in the average; None without any difference."""
    column, metrics = last_column(study), shown_metrics(study)
    found = {group.name(): {metric: compare(group, column, metric) for metric in metrics} for group in groups}
    compared = [group for group in groups if any(found[group.name()].values())]
    if not compared:
        return None

    def entries(group: Group) -> Iterable[Entry]:
        for metric in metrics:
            yield from _difference(found[group.name()][metric], metric)

    columns = tuple(
        Column(name, metric_label(metric))
        for metric in metrics
        for name in ("difference", "95 % interval", "p", "seeds above 0")
    )
    return Table(heads_of(keys), columns, rows_of(study, compared, keys, entries))


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


def noticed_table(study: Study, groups: Sequence[Group], keys: Sequence[str], compare: Compare) -> Table | None:
    """Return how many people would notice each difference, as `eval` has it; None where no metric has a relation."""
    about = study.results["test_set"] or {}
    known = relations(shown_metrics(study), about.get("bleu_tokenizer"), about.get("metric_models") or {})
    pairs = [(column, metric) for column in columns_of(study) for metric in known]
    found = {group: [compare(group, *pair) for pair in pairs] for group in groups}
    compared = [group for group in groups if any(found[group])]
    if not compared:
        return None

    def entries(group: Group) -> Iterable[Entry]:
        for (_, metric), difference in zip(pairs, found[group], strict=True):
            scaled = None if difference is None else difference.value * metric_look(metric).scale
            yield noticed_entry(None if scaled is None else share(known[metric], scaled))

    columns = tuple(Column(metric_label(metric), column) for column, metric in pairs)
    return Table(heads_of(keys), columns, rows_of(study, compared, keys, entries))


def summary_table(
    study: Study,
    groups: Sequence[Group],
    keys: Sequence[str],
    columns: Mapping[str, Callable[[Group], Entry]],
) -> Table | None:
    """Return a table of ``columns`` (name -> a group's figure) without those that nobody has; None without any."""
    found = {name: [figure(group) for group in groups] for name, figure in columns.items()}
    kept = {name: entries for name, entries in found.items() if any(one != NOTHING for one in entries)}
    if not kept:
        return None
    by_group = dict(zip([group.name() for group in groups], zip(*kept.values(), strict=True), strict=True))
    rows = rows_of(study, groups, keys, lambda group: by_group[group.name()])
    rows = tuple(row for row in rows if any(one != NOTHING for one in row.entries))
    return Table(heads_of(keys), tuple(map(Column, kept)), rows)
