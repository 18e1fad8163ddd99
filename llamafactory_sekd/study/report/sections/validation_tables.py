"""A study without an evaluation: the metrics of the validation text are the judge."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from llamafactory_sekd.reporting.document import NOTHING, Entry, Section
from llamafactory_sekd.reporting.metric_labels import number
from llamafactory_sekd.study.report.cells import Group
from llamafactory_sekd.study.report.paired import paired_cells
from llamafactory_sekd.study.report.sections.score_tables import selection_section
from llamafactory_sekd.study.report.sections.training import LAST_METRICS, validation
from llamafactory_sekd.study.report.tables import entry, summary_table
from llamafactory_sekd.study.report.views import Views


# What systems with different objectives can be compared by, and which way is better.
COMPARABLE = {"NLL": min, "agreement (%)": max, "KL(p ‖ q)": min}


def sections(views: Views) -> Iterator[Section | None]:
    """Yield the table of all systems, each at its own best value where one was selected, and how it was chosen."""
    if not views.study.groups:
        return
    if views.chosen:
        yield _validation(views, views.groups, {group: views.baseline_of(group) for group in views.groups}, main=True)
        yield selection_section(views)
    groups = views.study.groups
    baselines = {group: views.study.baseline_of(group) for group in groups}
    yield _validation(views, groups, baselines, main=not views.chosen)


def _validation(
    views: Views, groups: Sequence[Group], baselines: Mapping[Group, Group | None], main: bool
) -> Section | None:
    best = {name: _best(groups, name) for name in COMPARABLE}

    def cell(group: Group, name: str) -> Entry:
        metric, digits, scale = LAST_METRICS[name]
        shown = entry(validation(group, metric), digits, scale)
        if shown == NOTHING or name not in COMPARABLE:
            return shown
        difference = _difference(group, baselines[group], metric)
        small = number(difference * scale, digits, sign=True) if difference is not None else ""
        return replace(shown, best=group in best[name], small=small)

    columns = {name: (lambda group, name=name: cell(group, name)) for name in LAST_METRICS}
    table = summary_table(views.study, groups, views.keys_of(groups), columns)
    if table is None:
        return None
    note = (
        "Mean ± sample standard deviation over the seeds, of the model that was saved, on the validation text. NLL, "
        "agreement (how often student and teacher have the same most likely token) and KL(p ‖ q) can be compared "
        "between systems; losses of different objectives cannot. The best of those three is bold."
    )
    if views.study.baseline is not None:
        note += f" The smaller figure is the difference to {views.study.baseline}, averaged over pairs of seeds."
    note += " The study names no `evaluation`, so nothing was generated, and no difference is tested."
    alarm = "One seed only: the variation between seeds is unknown." if all(len(g.cells) == 1 for g in groups) else ""
    title = "Validation" if main or not views.chosen else "Validation at equal settings"
    return Section(title, note, alarm, (table,), main=main)


def _best(groups: Sequence[Group], name: str) -> list[Group]:
    means = {group: found.mean for group in groups if (found := validation(group, LAST_METRICS[name][0])) is not None}
    if len(means) < 2:
        return []
    top = COMPARABLE[name](means.values())
    return [group for group, mean in means.items() if mean == top]


def _difference(group: Group, baseline: Group | None, metric: str) -> float | None:
    if baseline is None:
        return None
    pairs = [[(cell["validation"] or {}).get(metric) for cell in pair] for pair in paired_cells(group, baseline)]
    known = [own - other for own, other in pairs if own is not None and other is not None]
    return statistics.fmean(known) if known else None
