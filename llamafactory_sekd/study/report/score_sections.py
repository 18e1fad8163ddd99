"""Who is better: scores, the differences behind their †, plots over keys; or the validation metrics instead."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from llamafactory_sekd.evaluation.evaluation_tables import noticed_section
from llamafactory_sekd.evaluation.significance import SAMPLES
from llamafactory_sekd.reporting.document import NOTHING, Column, Entry, Row, Section, Table
from llamafactory_sekd.reporting.metric_labels import AVERAGE, BETTER, MARKS, WORSE, metric_label, number
from llamafactory_sekd.study.report.cells import Group, Study, paired_cells, short_names, shown, symbol
from llamafactory_sekd.study.report.score_plots import (
    differences_plot,
    over_key,
    progressive_plot,
    selection_plot,
    similarity_plot,
)
from llamafactory_sekd.study.report.views import (
    LAST_METRICS,
    Compare,
    Views,
    difference_table,
    entry,
    leaders,
    mark_of,
    noticed_table,
    score_table,
    selected_by,
    summary_table,
)


# Between names, which often hold commas.
SEPARATOR = " · "


def score_sections(views: Views) -> Iterator[Section | None]:
    """Yield the sections about scores."""
    if not views.study.groups and not views.study.models:
        return
    if views.chosen:
        key = symbol(views.chosen[0].key)
        title = f"Scores, each system at its own best {key}"
        yield _scores(views, title, views.groups, views.at_own_best, own_best=True)
        yield _noticed(views)
        yield _selection(views)
        yield _scores(views, "Scores at equal settings", views.study.groups, views.at_equal_settings)
    else:
        yield _scores(views, "Scores", views.groups, views.at_equal_settings)
        yield _noticed(views)
    yield _differences(views)
    yield _over_keys(views)
    yield _progressive(views)
    yield _similarity(views)


def _scores(views: Views, title: str, groups: Sequence[Group], compare: Compare, own_best: bool = False) -> Section:
    study = views.study
    tested = _how_it_was_tested(study) if own_best or not views.chosen else "Tested as above."
    note = "Mean ± sample standard deviation over the seeds. The best score of a column is bold, the teacher aside."
    if "comet" in study.shown_metrics:
        note += " COMET is shown times 100."
    if study.baseline is not None:
        partner = "the baseline at its own best value" if own_best else "the baseline at the same point of the matrix"
        note += (
            f" The smaller figure is the difference to {study.baseline}"
            + (f" ({partner})" if study.keys else "")
            + f". {MARKS}. {tested}"
        )
    alarm = ""
    if groups and all(len(group.cells) == 1 for group in groups):
        alarm = "One seed only: the variation between seeds is unknown. "
    if views.unreadable is not None:
        alarm += f"Significance, hard sentences and rare words are left out: {views.unreadable}"
    table = score_table(study, (*study.models, *groups), compare)
    return Section(title, note, alarm.strip(), (table,), main=own_best or not views.chosen)


def _noticed(views: Views) -> Section | None:
    table = noticed_table(views.study, (*views.study.models, *views.groups), views.at_own_best)
    return noticed_section(table) if table is not None else None


def _how_it_was_tested(study: Study) -> str:
    """Return how significance was tested, in words."""
    text = (
        f"Paired bootstrap: the test sentences were resampled {SAMPLES:,} times, the same resamples for every system "
        "and seed; each seed is paired with the baseline's same seed, and the differences are averaged over pairs. "
        "Seeds were not resampled, so † and ▾ account for the choice of sentences, ± for the choice of seeds. p is "
        "sacrebleu's, corrected by Holm for the number of systems and points that a column compares; as it looks at "
        "one side, a mark also asks for an interval of the difference that is clear of zero."
    )
    if "comet" in study.shown_metrics:
        text += " For COMET the segment scores were resampled."
    return text


def _selection(views: Views) -> Section:
    """Show how each system's value was chosen."""
    study, chosen = views.study, [choice for choice in views.chosen if choice.tried]
    key = chosen[0].key if chosen else views.chosen[0].key
    keys = study.keys_of([choice.group for choice in chosen])
    others = [name for name in keys if name != key]
    values = list(dict.fromkeys(value for choice in chosen for value, _ in choice.tried))
    rows = tuple(
        Row(
            (choice.group.system, *(shown(choice.group.value(name)) for name in others)),
            tuple(
                Entry(number(dict(choice.tried)[value], 4), best=value == choice.value)
                if value in dict(choice.tried)
                else NOTHING
                for value in values
            ),
        )
        for choice in chosen
    )
    table = Table(("system", *map(symbol, others)), tuple(Column(shown(value), symbol(key)) for value in values), rows)
    at_edge = [choice.group.name(without=[key]) for choice in chosen if choice.at_the_edge]
    alarm = ""
    if at_edge:
        names = SEPARATOR.join(at_edge)
        alarm = f"The best {symbol(key)} is at the edge of what was tried, a better one may lie beyond: {names}."
    plot = selection_plot(views)
    note = f"Chosen by the {selected_by(study)}, averaged over the seeds (bold). The test set had no part in it."
    return Section(f"How {symbol(key)} was chosen", note, alarm, (table,), (plot,) if plot else ())


def _differences(views: Views) -> Section | None:
    table = difference_table(views.study, views.groups, views.at_own_best)
    if table is None:
        return None
    column = views.study.last_column
    where = "the average over directions" if column == AVERAGE else column
    note = (
        f"Against {views.study.baseline}, {where}. The interval is of the sampling of test sentences alone. “Seeds "
        "above 0” counts the pairs of seeds in which the system is ahead: where they disagree, another seed may "
        "reverse the result."
    )
    plot = differences_plot(views, views.groups, views.at_own_best)
    return Section(
        "Differences to the baseline",
        note,
        tables=(table,),
        plots=(plot,) if plot else (),
        lines=tuple(_verdicts(views)),
    )


def _verdicts(views: Views) -> Iterator[str]:
    """Say per metric who is better than the baseline, who is behind, and where the test cannot tell."""
    column = views.study.last_column
    for metric in views.study.shown_metrics:
        found = {group: views.at_own_best(group, column, metric) for group in views.groups}
        known = {group: mark_of(difference, metric) for group, difference in found.items() if difference is not None}
        names = short_names(views.groups)
        verdicts = {
            f"better ({BETTER})": [names[group] for group, mark in known.items() if mark == BETTER],
            f"behind ({WORSE})": [names[group] for group, mark in known.items() if mark == WORSE],
            "undecided": [names[group] for group, mark in known.items() if not mark],
        }
        said = "; ".join(f"{verdict}: {SEPARATOR.join(who)}" for verdict, who in verdicts.items() if who)
        yield f"{metric_label(metric)}, {said}."


def _over_keys(views: Views) -> Section | None:
    keys = views.remaining_keys
    if len(keys) != 1:
        return None
    plot = over_key(views, keys[0])
    return Section(f"Scores over {symbol(keys[0])}", plots=(plot,)) if plot else None


def _progressive(views: Views) -> Section | None:
    plot = progressive_plot(views)
    note = "β is the student's share of the proxy (equation 6); the paper's Figure 3 counts the target's share, 1 - β."
    return Section("Progressive and fixed β", note, plots=(plot,)) if plot else None


def _similarity(views: Views) -> Section | None:
    study, column = views.study, views.study.last_column
    groups = [group for group in (*study.models, *views.groups) if group.system != study.teacher]
    columns = {
        name: (lambda group, name=name: entry(group.similarity(name)))
        for name in dict.fromkeys((*study.directions, column))
    }
    table = summary_table(study, groups, columns)
    plot = similarity_plot(views)
    note = f"SacreBLEU with the translations of {study.teacher} as references (Fig. 4 of the paper)."
    return (
        Section("Similarity to the teacher", note, tables=(table,), plots=(plot,) if plot else ()) if table else None
    )


# What systems with different objectives can be compared by, and which way is better.
COMPARABLE = {"NLL": min, "agreement (%)": max, "KL(p ‖ q)": min}


def validation_sections(views: Views) -> Iterator[Section | None]:
    """Yield, without an evaluation, all systems, each at its own best value where one was selected, and how."""
    if not views.study.groups:
        return
    if views.chosen:
        yield _validation(views, views.groups, {group: views.baseline_of(group) for group in views.groups}, main=True)
        yield _selection(views)
    groups = views.study.groups
    baselines = {group: views.study.baseline_of(group) for group in groups}
    yield _validation(views, groups, baselines, main=not views.chosen)


def _validation(
    views: Views, groups: Sequence[Group], baselines: Mapping[Group, Group | None], main: bool
) -> Section | None:
    best = {name: _best(groups, name) for name in COMPARABLE}

    def cell(group: Group, name: str) -> Entry:
        metric, digits, scale = LAST_METRICS[name]
        shown = entry(group.validation(metric), digits, scale)
        if shown == NOTHING or name not in COMPARABLE:
            return shown
        difference = _difference(group, baselines[group], metric)
        small = number(difference * scale, digits, sign=True) if difference is not None else ""
        return replace(shown, best=group in best[name], small=small)

    columns = {name: (lambda group, name=name: cell(group, name)) for name in LAST_METRICS}
    table = summary_table(views.study, groups, columns)
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
    means = {group: found.mean for group in groups if (found := group.validation(LAST_METRICS[name][0])) is not None}
    return leaders(means, COMPARABLE[name])


def _difference(group: Group, baseline: Group | None, metric: str) -> float | None:
    if baseline is None:
        return None
    pairs = [[(cell["validation"] or {}).get(metric) for cell in pair] for pair in paired_cells(group, baseline)]
    known = [own - other for own, other in pairs if own is not None and other is not None]
    return statistics.fmean(known) if known else None
