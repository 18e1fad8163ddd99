"""The translations themselves: hard and easy sentences, rare and frequent words, and what has gone wrong."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.data.prompts import instruction
from llamafactory_sekd.data.readers import read_json_records
from llamafactory_sekd.errors import DataError, SekdError
from llamafactory_sekd.reporting.document import NOTHING, Column, Entry, Plot, Row, Section
from llamafactory_sekd.reporting.figures import BASELINE, Look, canvas, finish, name_below
from llamafactory_sekd.reporting.metric_labels import GUARD_LABELS, guard_is_alarming, number
from llamafactory_sekd.study.report.cells import Cell, Group, Study, Summary, Texts, summarize
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
        shares: of all groups and baselines, as in :class:`Recall`.
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


@dataclass(frozen=True)
class Halves:
    """BLEU (0 to 100) on both halves of every direction, averaged over directions, summarized over seeds."""

    hard: Summary | None
    easy: Summary | None


def judges(study: Study) -> tuple[Group, ...]:
    """Return whose sentence chrF2 makes the split: the teacher's where it was evaluated, else that of all systems.

    Never the baseline's: on sentences that were picked because it failed on them, a system looks bad by chance alone.
    """
    teacher = tuple(model for model in study.models if model.system == study.teacher)
    return teacher or study.groups


def hard_sentences(texts: Texts, judging: Sequence[Group], direction: str) -> np.ndarray:
    """Return which sentences are in the harder half, ``[sentences]`` bool; ties go by their place in the test set."""
    scores = np.mean([_sentence_chrf(texts, group, direction) for group in judging], axis=0)
    hard = np.zeros(len(scores), dtype=bool)
    hard[np.argsort(scores, kind="stable")[: len(scores) // 2]] = True
    return hard


def by_difficulty(study: Study, texts: Texts, groups: Sequence[Group]) -> list[Halves]:
    """Score the groups on both halves."""
    judging = judges(study)
    hard = {direction: hard_sentences(texts, judging, direction) for direction in study.directions}
    easy = {direction: ~chosen for direction, chosen in hard.items()}
    return [
        Halves(*(summarize(_bleu(texts, cell, half) for cell in group.cells.values()) for half in (hard, easy)))
        for group in groups
    ]


def _sentence_chrf(texts: Texts, group: Group, direction: str) -> np.ndarray:
    """Return the sentences' chrF2, averaged over the seeds."""
    return np.mean(
        [
            [statistics.score(row) for row in statistics.rows]
            for statistics in (texts.statistics(cell, direction, "chrf") for cell in group.cells.values())
        ],
        axis=0,
    )


def _bleu(texts: Texts, cell: Cell, chosen: dict[str, np.ndarray]) -> float:
    scores = []
    for direction, half in chosen.items():
        found = texts.statistics(cell, direction, "bleu")
        scores.append(found.score(found.rows[half].sum(0)))
    return float(np.mean(scores))


# The smallest frequency of each bucket.
BUCKETS = {"0": 0, "1–4": 1, "5–19": 5, "20–99": 20, "100–999": 100, "1,000+": 1000}


@dataclass(frozen=True)
class Recall:
    """Per bucket: how many words of the references fall into it, and of them each group's share (0 to 1)."""

    words: tuple[int, ...]
    shares: tuple[tuple[Summary | None, ...], ...]


@dataclass(frozen=True)
class _Words:
    """A direction's references: per sentence its words with their counts, and how often training has each word."""

    split: Callable[[str], list[str]]
    references: Sequence[Counter[str]]
    training: Mapping[str, int]

    def hits(self, hypotheses: Sequence[str] | None) -> list[int]:
        """Return per bucket how many words of the references stand in the translations; None counts them all."""
        found = [0] * len(BUCKETS)
        for index, reference in enumerate(self.references):
            common = reference if hypotheses is None else reference & Counter(self.split(hypotheses[index]))
            for word, count in common.items():
                found[_bucket(self.training.get(word, 0))] += count
        return found


def word_recall(study: Study, texts: Texts, groups: Sequence[Group]) -> Recall:
    """Return the recall over all directions together, one row of shares per group.

    A word is a token of BLEU's tokenizer with a letter or a digit in it. It counts as often as it appears in both the
    reference and the translation of a sentence. Raises :class:`DataError` where the training text cannot be read.
    """
    records = _training_records(study.groups[0])
    words = {direction: _words(texts, records, direction) for direction in study.directions}
    totals = _summed(one.hits(None) for one in words.values())

    def shares(cell: Cell) -> list[float | None]:
        hits = _summed(one.hits(texts.hypotheses(cell, direction)) for direction, one in words.items())
        return [hit / total if total else None for hit, total in zip(hits, totals, strict=True)]

    by_group = [[shares(cell) for cell in group.cells.values()] for group in groups]
    return Recall(
        tuple(totals),
        tuple(tuple(summarize(seeds) for seeds in zip(*cells, strict=True)) for cells in by_group),
    )


def _training_records(group: Group) -> list[Mapping[str, Any]]:
    """Return the records that a group was trained on, in LLaMA-Factory's alpaca format, from its local files.

    Raises :class:`DataError` for a data set from elsewhere, in another format, or that is not there.
    """
    config = next(iter(group.cells.values()))["config"]
    folder = Path(config.get("dataset_dir") or "data")
    records: list[Mapping[str, Any]] = []
    for name in str(config.get("dataset") or "").split(","):
        try:
            entry = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[name.strip()]
            loaded = [record for _, record in read_json_records(folder / entry["file_name"])]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"The training text {name!r} cannot be read below {folder} ({error!r:.120}).") from None
        column = (entry.get("columns") or {}).get("response", "output")
        if not all(isinstance(record, dict) and isinstance(record.get(column), str) for record in loaded):
            raise DataError(f"The training text {name!r} has records without a text in {column!r}.")
        records += [{**record, "output": record[column]} for record in loaded]
    return records


def _words(texts: Texts, records: Sequence[Mapping[str, Any]], direction: str) -> _Words:
    tokenizer = texts.metric("bleu", direction).tokenizer

    def split(text: str) -> list[str]:
        return [token for token in tokenizer(text).split() if any(map(str.isalnum, token))]

    wanted = instruction(parse_direction(direction))
    own = [record["output"] for record in records if record.get("instruction") == wanted]
    training = Counter(word for target in own or [record["output"] for record in records] for word in split(target))
    references = [Counter(split(reference)) for reference in texts.test_set(direction).references]
    return _Words(split, references, training)


def _bucket(frequency: int) -> int:
    return max(index for index, low in enumerate(BUCKETS.values()) if frequency >= low)


def _summed(rows: Any) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]
