"""The translations themselves: hard and easy sentences, rare and frequent words, and what has gone wrong."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from llamafactory_sekd.errors import SekdError
from llamafactory_sekd.reporting.document import NOTHING, Column, Entry, Row, Section, Table
from llamafactory_sekd.reporting.metric_labels import GUARD_LABELS, guard_is_alarming, number
from llamafactory_sekd.study.report.cells import Group, summarize
from llamafactory_sekd.study.report.frequency import BUCKETS, word_recall
from llamafactory_sekd.study.report.plots.words import frequency_plot
from llamafactory_sekd.study.report.sections.training import MOST_LINES
from llamafactory_sekd.study.report.sentences import by_difficulty, judges
from llamafactory_sekd.study.report.tables import entry, heads_of, rows_of, summary_table
from llamafactory_sekd.study.report.views import Views


def sections(views: Views) -> Iterator[Section | None]:
    """Yield the sections about translations."""
    groups = (*views.study.models, *views.groups)
    if not views.groups or not views.study.directions:
        return
    if views.unreadable is None:
        yield _difficulty(views, groups)
        yield _frequency(views, groups)
    yield _guards(views, groups)


def _difficulty(views: Views, groups: Sequence[Group]) -> Section:
    study = views.study
    halves = dict(zip(groups, by_difficulty(study, views.texts, groups), strict=True))
    by_teacher = bool(judges(study)) and judges(study)[0].system == study.teacher
    columns = {
        "hard half": lambda group: entry(halves[group].hard),
        "easy half": lambda group: entry(halves[group].easy),
        "hard, to the baseline": lambda group: _delta(views, halves, group, "hard"),
        "easy, to the baseline": lambda group: _delta(views, halves, group, "easy"),
    }
    table = summary_table(study, groups, views.keys_of(groups), columns)
    judge = f"{study.teacher} (the teacher)" if by_teacher else "all systems together, each with the same weight"
    note = (
        f"BLEU of the halves of each test set, averaged over directions. Hard is the half on which {judge} has the "
        "lower sentence chrF2. The baseline's own scores would not do: a system is bound to look bad on sentences "
        "that were picked because it failed on them"
        + (", which is also why the teacher's row cannot be read against the others." if by_teacher else ".")
    )
    return Section("Hard and easy sentences", note, tables=(table,) if table else ())


def _delta(views: Views, halves: dict, group: Group, half: str) -> Entry:
    baseline = views.baseline_of(group)
    own, base = getattr(halves[group], half), getattr(halves.get(baseline), half, None)
    return Entry(number(own.mean - base.mean, sign=True)) if own and base else NOTHING


def _frequency(views: Views, groups: Sequence[Group]) -> Section:
    title = "Rare and frequent words"
    try:
        recall = word_recall(views.study, views.texts, groups)
    except SekdError as error:
        return Section(title, alarm=f"Left out: {error}")
    shares = dict(zip(groups, recall.shares, strict=True))
    columns = tuple(Column(name, "times in training:") for name in BUCKETS)
    keys = views.keys_of(groups)
    counts = Row(("words of the references", *("" for _ in keys)), tuple(Entry(f"{n:,}") for n in recall.words))
    rows = rows_of(views.study, groups, keys, lambda group: [entry(share, 1, 100.0) for share in shares[group]])
    note = (
        "Recall, in percent, of the references' words (tokens of BLEU's tokenizer with a letter or a digit, case "
        "kept) by how often the training text has them in the target language. Recall by part of speech is left out: "
        "it needs a tagger for every language."
    )
    plot = None
    if len(views.groups) <= MOST_LINES and len({group.system for group in views.groups}) == len(views.groups):
        baselines = {group: views.baseline_of(group) for group in views.groups}
        plot = frequency_plot(baselines, recall.words, shares, views.looks)
    return Section(
        title, note, tables=(Table(heads_of(keys), columns, (counts, *rows)),), plots=(plot,) if plot else ()
    )


def _guards(views: Views, groups: Sequence[Group]) -> Section | None:
    columns = {label: (lambda group, name=name: _guard(group, name)) for name, label in GUARD_LABELS.items()}
    table = summary_table(views.study, groups, views.keys_of(groups), columns)
    note = (
        "Shares of the sentences in percent (the length ratio is output by reference, in tokens), averaged over "
        "directions."
    )
    return Section("Guards", note, tables=(table,)) if table else None


def _guard(group: Group, name: str) -> Entry:
    seeds = []
    for cell in group.cells.values():
        known = [row[name] for row in (cell.get("guards") or {}).values() if row.get(name) is not None]
        seeds.append(statistics.fmean(known) if known else None)
    summary = summarize(seeds)
    if summary is None:
        return NOTHING
    found = entry(summary) if name == "length_ratio" else entry(summary, 2, 100.0)
    return Entry(found.text, found.spread, alarm=guard_is_alarming(name, summary.mean))
