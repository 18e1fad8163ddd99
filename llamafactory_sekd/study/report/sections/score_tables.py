"""Scores: the paper's table, the differences behind its †, and the figures over the keys of the matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llamafactory_sekd.evaluation.noticed import noticed_section
from llamafactory_sekd.evaluation.significance import SAMPLES
from llamafactory_sekd.reporting.document import Column, Entry, Row, Section, Table
from llamafactory_sekd.reporting.metric_labels import AVERAGE, BETTER, MARKS, WORSE, metric_label, number
from llamafactory_sekd.study.report.best_values import selected_by
from llamafactory_sekd.study.report.cells import Group, short_names, shown, symbol
from llamafactory_sekd.study.report.plots.bars import progressive_plot, similarity_plot
from llamafactory_sekd.study.report.plots.differences import differences_plot
from llamafactory_sekd.study.report.plots.keys import over_key, selection_plot
from llamafactory_sekd.study.report.tables import (
    NOTHING,
    Compare,
    difference_table,
    entry,
    last_column,
    mark_of,
    noticed_table,
    score_table,
    shown_metrics,
    summary_table,
)
from llamafactory_sekd.study.report.views import Views


# Between names, which often hold commas.
SEPARATOR = " · "


def sections(views: Views) -> Iterator[Section | None]:
    """Yield the sections about scores."""
    if not views.study.groups and not views.study.models:
        return
    if views.chosen:
        key = symbol(views.chosen[0].key)
        yield _scores(
            views, f"Scores, each system at its own best {key}", views.groups, views.at_own_best, own_best=True
        )
        yield _noticed(views)
        yield selection_section(views)
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
    tested = how_it_was_tested(views) if own_best or not views.chosen else "Tested as above."
    rows = (*study.models, *groups)
    note = "Mean ± sample standard deviation over the seeds. The best score of a column is bold, the teacher aside."
    if "comet" in shown_metrics(study):
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
    table = score_table(study, rows, views.keys_of(groups), compare)
    return Section(title, note, alarm.strip(), (table,), main=own_best or not views.chosen)


def _noticed(views: Views) -> Section | None:
    rows = (*views.study.models, *views.groups)
    table = noticed_table(views.study, rows, views.keys_of(views.groups), views.at_own_best)
    return noticed_section(table) if table is not None else None


def how_it_was_tested(views: Views) -> str:
    """Return how significance was tested, in words."""
    text = (
        f"Paired bootstrap: the test sentences were resampled {SAMPLES:,} times, the same resamples for every system "
        "and seed; each seed is paired with the baseline's same seed, and the differences are averaged over pairs. "
        "Seeds were not resampled, so † and ▾ account for the choice of sentences, ± for the choice of seeds. p is "
        "sacrebleu's, corrected by Holm for the number of systems and points that a column compares; as it looks at "
        "one side, a mark also asks for an interval of the difference that is clear of zero."
    )
    if "comet" in shown_metrics(views.study):
        text += " For COMET the segment scores were resampled."
    return text


def selection_section(views: Views) -> Section:
    """Show how each system's value was chosen."""
    study, chosen = views.study, [choice for choice in views.chosen if choice.tried]
    key = chosen[0].key if chosen else views.chosen[0].key
    keys = views.keys_of([choice.group for choice in chosen])
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
    plot = selection_plot(study, chosen, views.looks)
    note = f"Chosen by the {selected_by(study)}, averaged over the seeds (bold). The test set had no part in it."
    return Section(f"How {symbol(key)} was chosen", note, alarm, (table,), (plot,) if plot else ())


def _differences(views: Views) -> Section | None:
    table = difference_table(views.study, views.groups, views.keys_of(views.groups), views.at_own_best)
    if table is None:
        return None
    column = last_column(views.study)
    where = "the average over directions" if column == AVERAGE else column
    note = (
        f"Against {views.study.baseline}, {where}. The interval is of the sampling of test sentences alone. “Seeds "
        "above 0” counts the pairs of seeds in which the system is ahead: where they disagree, another seed may "
        "reverse the result."
    )
    plot = differences_plot(views.study, views.groups, views.at_own_best, views.looks)
    return Section(
        "Differences to the baseline",
        note,
        tables=(table,),
        plots=(plot,) if plot else (),
        lines=tuple(_verdicts(views)),
    )


def _verdicts(views: Views) -> Iterator[str]:
    """Say per metric who is better than the baseline, who is behind, and where the test cannot tell."""
    column = last_column(views.study)
    for metric in shown_metrics(views.study):
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
    plot = over_key(views.study, views.groups, keys[0], views.looks)
    return Section(f"Scores over {symbol(keys[0])}", plots=(plot,)) if plot else None


def _progressive(views: Views) -> Section | None:
    plot = progressive_plot(views.study, views.groups, views.looks)
    note = "β is the student's share of the proxy (equation 6); the paper's Figure 3 counts the target's share, 1 - β."
    return Section("Progressive and fixed β", note, plots=(plot,)) if plot else None


def _similarity(views: Views) -> Section | None:
    study, column = views.study, last_column(views.study)
    groups = [group for group in (*study.models, *views.groups) if group.system != study.teacher]
    columns = {
        name: (lambda group, name=name: entry(group.similarity(name)))
        for name in dict.fromkeys((*study.directions, column))
    }
    table = summary_table(study, groups, views.keys_of(groups), columns)
    plot = similarity_plot(study, views.groups, views.looks)
    note = f"SacreBLEU with the translations of {study.teacher} as references (Fig. 4 of the paper)."
    return (
        Section("Similarity to the teacher", note, tables=(table,), plots=(plot,) if plot else ()) if table else None
    )
