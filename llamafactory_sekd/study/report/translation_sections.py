"""The translations themselves: hard and easy sentences, rare and frequent words, and what has gone wrong."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from llamafactory_sekd.errors import SekdError
from llamafactory_sekd.reporting.document import NOTHING, Column, Entry, Plot, Row, Section
from llamafactory_sekd.reporting.figures import BASELINE, Look, canvas, finish, name_below
from llamafactory_sekd.reporting.metric_labels import GUARD_LABELS, guard_is_alarming, number
from llamafactory_sekd.study.report.cells import Group, Summary, summarize
from llamafactory_sekd.study.report.text_statistics import BUCKETS, by_difficulty, judges, word_recall
from llamafactory_sekd.study.report.views import MOST_LINES, Views, entry, group_table, summary_table


def translation_sections(views: Views) -> Iterator[Section | None]:
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
    table = summary_table(study, groups, columns)
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
    columns = (Column(name, "times in training:") for name in BUCKETS)
    table = group_table(
        views.study, groups, columns, lambda group: [entry(share, 1, 100.0) for share in shares[group]]
    )
    names = ("words of the references", *("" for _ in table.heads[1:]))
    counts = Row(names, tuple(Entry(f"{n:,}") for n in recall.words))
    table = replace(table, rows=(counts, *table.rows))
    note = (
        "Recall, in percent, of the references' words (tokens of BLEU's tokenizer with a letter or a digit, case "
        "kept) by how often the training text has them in the target language. Recall by part of speech is left out: "
        "it needs a tagger for every language."
    )
    plot = None
    if len(views.groups) <= MOST_LINES and len({group.system for group in views.groups}) == len(views.groups):
        baselines = {group: views.baseline_of(group) for group in views.groups}
        plot = frequency_plot(baselines, recall.words, shares, views.looks)
    return Section(title, note, tables=(table,), plots=(plot,) if plot else ())


def _guards(views: Views, groups: Sequence[Group]) -> Section | None:
    columns = {label: (lambda group, name=name: _guard(group, name)) for name, label in GUARD_LABELS.items()}
    table = summary_table(views.study, groups, columns)
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


def frequency_plot(
    baselines: Mapping[Group, Group | None],
    words: Sequence[int],
    shares: Mapping[Group, Sequence[Summary | None]],
    looks: Mapping[str, Look],
) -> Plot | None:
    """Draw the recall of each group minus its baseline's, in points; None where no group has a baseline.

    Args:
        baselines: the groups to draw, one per system, and each one's baseline.
        words: how many words of the references each bucket has.
        shares: of all groups and baselines, as in :class:`~llamafactory_sekd.study.report.text_statistics.Recall`.
        looks: by system.
    """
    present = [bucket for bucket, count in enumerate(words) if count]
    with canvas(height=3.6) as (figure, (axes,)):
        drawn: dict[str, Look] = {}
        for group, baseline in baselines.items():
            if baseline is None:
                continue
            gains = [
                100 * (own.mean - base.mean)
                for bucket in present
                if (own := shares[group][bucket]) is not None and (base := shares[baseline][bucket]) is not None
            ]
            look = looks[group.system]
            axes.plot(gains, color=look.color, marker=look.marker, linestyle=look.line)
            drawn[group.system] = look
        if not drawn:
            return None
        axes.axhline(0, color=BASELINE, linewidth=1.2)
        axes.set_xticks(range(len(present)), [f"{list(BUCKETS)[one]}\n({words[one]:,})" for one in present])
        axes.set(
            xlabel="occurrences in the training text (words of the references)", ylabel="recall, difference in points"
        )
        name_below(figure, {**drawn, "the baseline": Look(BASELINE, "", "-")})
        caption = "Recall of the references' words by their frequency in the training text, against the baseline."
        return finish(figure, "frequency", caption)
