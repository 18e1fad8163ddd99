"""The tables of an evaluation's report, by the contents of results.json."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from llamafactory_sekd.evaluation.scores import SURFACE_METRICS
from llamafactory_sekd.evaluation.significance import SAMPLES, TRIALS, is_significant
from llamafactory_sekd.reporting.document import NOTHING, Column, Entry, Plot, Row, Section, Table
from llamafactory_sekd.reporting.figures import INK, canvas, distinct_looks, finish
from llamafactory_sekd.reporting.metric_labels import (
    AVERAGE,
    GUARD_LABELS,
    MARKS,
    best_of,
    guard_is_alarming,
    metric_label,
    metric_look,
    number,
    p_text,
    score_text,
    significance_mark,
)


# Columns of figures of more than two metrics that fit on a page side by side.
WIDEST = 8

NOTICED = (
    "Of a hundred pairs of systems with the same difference, the number that people put in the same order (Kocmi et "
    "al., 2024, over 94 languages); 50 % is a coin toss. It says nothing of this test set's sentences, as p does; of "
    "BLEU and chrF2 it holds where systems are related, as students of one kind."
)


def score_sections(results: Mapping[str, Any]) -> Iterator[Section]:
    """Yield the paper's table, and chrF2 in a table of its own where the metrics of the paper are there."""
    metrics = shown_metrics(results)
    main = tuple(metric for metric in metrics if metric != "chrf") or metrics
    left_out = [f"{metric_look(metric).label} was skipped: {reason}" for metric, reason in results["skipped"].items()]
    alarm = " ".join([*left_out, *results["notes"]])
    if not main:
        yield Section("Scores", "No metric of this evaluation can run; see the guards.", alarm, main=True)
        return
    yield Section("Scores", _scores_note(results), alarm, tuple(_score_tables(results, main)), main=True)
    others = tuple(metric for metric in metrics if metric not in main)
    if others:
        note = "A score over characters, more tolerant of rich morphology than BLEU."
        yield Section(metric_label(others[0]), note, tables=(_score_table(results, others),), main=True)


def _scores_note(results: Mapping[str, Any]) -> str:
    note = ""
    if results["baseline"] is not None:
        test = "paired bootstrap" if results["test"] == "paired_bs" else "paired approximate randomization"
        resampled = [metric_label(m) for m in shown_metrics(results) if m in SURFACE_METRICS]
        by_model = [metric_label(m) for m in shown_metrics(results) if m not in SURFACE_METRICS]
        how = [f"{_and(resampled)} by {test}"] if resampled else []
        how += [f"{_and(by_model)} by a paired t-test, and over all directions by {test}"] if by_model else []
        note = (
            f"± is the 95 % interval of a bootstrap with {SAMPLES:,} samples. The smaller figures are differences to "
            f"the baseline {results['baseline']}. {MARKS}; "
            f"{'; '.join(how)}. "
        )
    note += "The best score of a column is bold"
    note += ", the teacher aside." if results["teacher"] is not None else "."
    note += " COMET is shown times 100." if any(m.startswith("comet") for m in shown_metrics(results)) else ""
    lower = [metric_label(m) for m in shown_metrics(results) if not metric_look(m).higher_is_better]
    return note + (f" Of {_and(lower)}, lower is better." if lower else "")


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _score_tables(results: Mapping[str, Any], metrics: Sequence[str]) -> Iterator[Table]:
    """Yield one table of all metrics, or one for each where they would not fit on a page."""
    if len(metrics) <= 2 or len(metrics) * len(columns_of(results)) <= WIDEST:
        yield _score_table(results, metrics)
        return
    for metric in metrics:
        yield _score_table(results, [metric])


def _score_table(results: Mapping[str, Any], metrics: Sequence[str]) -> Table:
    return _by_column(
        results, results["systems"], metrics, lambda *place: score_entry(results, *place), title=results["task"]
    )


def _by_column(
    results: Mapping[str, Any],
    names: Iterable[str],
    metrics: Iterable[str],
    entry: Callable[[str, str, str], Entry],
    prefix: str = "",
    title: str = "",
) -> Table:
    """Return a row for each system of ``names``, with the ``entry`` of each direction and of the average by metric."""
    pairs = list(itertools.product(columns_of(results), metrics))
    columns = tuple(Column(f"{prefix}{metric_label(metric)}", column) for column, metric in pairs)
    rows = tuple(row_of(results, name, [entry(name, *pair) for pair in pairs]) for name in names)
    return Table(("system",), columns, rows, title)


def significance_section(results: Mapping[str, Any]) -> Section | None:
    """List p of every test: hovering over a score does not print."""
    if len(results["significance"]) < 2:
        return None
    names = [name for name in results["significance"] if name != results["baseline"]]
    table = _by_column(results, names, shown_metrics(results), lambda *place: _p_entry(results, *place), "p, ")
    trials = f"{SAMPLES:,} resamples" if results["test"] == "paired_bs" else f"{TRIALS:,} trials"
    note = (
        f"p of the paired tests against the baseline {results['baseline']} ({trials}), corrected for the number of "
        "systems by Holm; below it, p of the test alone."
    )
    return Section("Significance", note, tables=(table,))


def noticed_by_people(results: Mapping[str, Any]) -> Section | None:
    """Say how many people would notice the differences, by the metrics with a known relation."""
    found = results["noticed"]
    known = {metric for one in found.values() for shares in one.values() for metric in shares}
    shown = [metric for metric in shown_metrics(results) if metric in known]
    if not shown:
        return None
    return noticed_section(
        _by_column(results, found, shown, lambda name, column, metric: noticed_entry(found[name][column].get(metric)))
    )


def noticed_entry(found: float | None) -> Entry:
    """Return a share as a report shows it; nothing where there is none."""
    if found is None:
        return NOTHING
    return Entry(f"{100 * found:.0f} %" if found > 0.5 else "≤ 50 %")


def noticed_section(table: Table) -> Section:
    """Return the section of a report about it: a row for each system, a column for each metric with a relation."""
    return Section("Noticed by people", NOTICED, tables=(table,), main=True)


def _p_entry(results: Mapping[str, Any], name: str, column: str, metric: str) -> Entry:
    """Return p, none for equal scores: sacrebleu's bootstrap has 1/1001 for them, which says nothing."""
    own, base = (results["systems"][one]["scores"][column][metric] for one in (name, results["baseline"]))
    test = results["significance"][name][column].get(metric, {})
    if own == base or test.get("p") is None:
        return NOTHING
    several = len(results["significance"]) > 2
    return Entry(p_text(test["p_holm"]), small=p_text(test["p"]) if several else "")


def similarity_section(results: Mapping[str, Any]) -> Section | None:
    """Show how closely each system follows the teacher."""
    found = {name: entry["similarity"] for name, entry in results["systems"].items() if entry["similarity"]}
    if not found:
        return None
    columns = columns_of(results)
    rows = tuple(
        row_of(results, name, [_similarity_entry(values[column]) for column in columns])
        for name, values in found.items()
    )
    note = f"BLEU with the translations of {results['teacher']} as references: how closely a student follows it."
    table = Table(("system",), tuple(Column("BLEU", column) for column in columns), rows)
    return Section("Similarity to the teacher", note, tables=(table,))


def _similarity_entry(value: float | None) -> Entry:
    return NOTHING if value is None else Entry(number(value, 1), bar=value / 100)


def guards_section(results: Mapping[str, Any]) -> Section:
    """Show what goes wrong that a corpus score hides, by direction and system."""
    everyone = [
        (d, name, entry["guards"][d]) for d in results["directions"] for name, entry in results["systems"].items()
    ]
    shown = [guard for guard in GUARD_LABELS if any(found[guard] is not None for _, _, found in everyone)]
    shown = [guard for guard in shown if guard != "thoughts" or any(found[guard] for _, _, found in everyone)]
    rows = tuple(
        row_of(results, name, [_guard(guard, found[guard]) for guard in shown], direction)
        for direction, name, found in everyone
    )
    note = (
        "Shares of the sentences; the length ratio is output by reference, in tokens. Extra text is a heading of a "
        "prompt, a preface, or quotation marks around all of it. Values that deserve a look are marked."
    )
    if "thoughts" in shown:
        note += " Thoughts before a translation are counted and removed."
    if "unaligned" in shown:
        note += (
            " Documents were translated together; the sentences of one that came back with another number of lines "
            "were translated again, one by one."
        )
    table = Table(("system", "direction"), tuple(Column(GUARD_LABELS[guard]) for guard in shown), rows)
    return Section("Guards", note, tables=(table,))


def _guard(name: str, value: float | None) -> Entry:
    if value is None:
        return NOTHING
    text = f"{value:.2f}" if name == "length_ratio" else f"{100 * value:.1f} %"
    return Entry(text, alarm=guard_is_alarming(name, value))


def parts_section(results: Mapping[str, Any]) -> Section:
    """Show the scores by the length of the source and, where the test set knows them, by domain and by document."""
    note = (
        "In brackets: how many sentences a part has; corpus scores of few sentences vary a lot. Length is that of the "
        "source in words; where a language writes no spaces, two characters count as one."
    )
    tables = [
        *_part_tables(results, "by_domain", "domain"),
        *_document_tables(results),
        *_part_tables(results, "by_length", "length"),
    ]
    known = [what for key, what in (("by_domain", "domain"), ("by_document", "document")) if results[key]]
    title = f"By {', '.join(known)} and length" if known else "By length"
    if results["by_document"]:
        note += " By document: mean ± standard deviation of the documents' own scores."
    return Section(title, note, tables=tuple(tables))


def _part_tables(results: Mapping[str, Any], key: str, what: str) -> Iterator[Table]:
    """Yield a table for each direction and metric; the first metric's is open, the others fold."""
    for direction, parts in results[key].items():
        for place, metric in enumerate(shown_metrics(results)):
            columns = tuple(Column(f"{name or 'unnamed'} ({one['sentences']:,})") for name, one in parts.items())
            rows = tuple(
                row_of(
                    results, name, [Entry(score_text(metric, one["scores"][name][metric])) for one in parts.values()]
                )
                for name in results["systems"]
            )
            title = f"{metric_label(metric)} by {what}, {direction}"
            yield Table(("system",), columns, rows, title, folded=place > 0)


def _document_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    metrics = shown_metrics(results)
    for direction, found in results["by_document"].items():
        columns = tuple(Column(metric_label(metric)) for metric in metrics)
        rows = tuple(
            row_of(
                results,
                name,
                [Entry(score_text(m, scores[m]["mean"]), score_text(m, scores[m]["sd"])) for m in metrics],
            )
            for name, scores in found["scores"].items()
        )
        yield Table(("system",), columns, rows, f"By document, {direction} ({found['documents']:,} documents)")


def costs_section(results: Mapping[str, Any]) -> Section | None:
    """Show what each model takes, and its quality against its size."""
    found = {name: entry["cost"] for name, entry in results["systems"].items() if entry["cost"]}
    if not found:
        return None
    column = columns_of(results)[-1]
    metrics = shown_metrics(results)[-1:]  # the last one is a model's, where there is one
    rows = tuple(
        row_of(
            results,
            name,
            [
                *(score_entry(results, name, column, metric) for metric in metrics),
                _amount(cost["parameters"], 1e6),
                _amount(cost["disk_bytes"], 1e9),
                _amount(cost["sentences_per_second"], 1),
                _amount(cost["peak_memory"], 1e9),
            ],
        )
        for name, cost in found.items()
    )
    names = ("parameters (M)", "on disk (GB)", "sentences/s", "GPU memory (GB)")
    columns = (*(Column(f"{metric_label(metric)}, {column}") for metric in metrics), *map(Column, names))
    plots = tuple(plot for metric in metrics if (plot := _cost_plot(results, found, metric, column)) is not None)
    note = (
        "Parameters and bytes are those of the model's files, adapters included; speed is over all directions and "
        "processes, and memory the most that one GPU had to hold, as this run measured them."
    )
    return Section("Quality and cost", note, tables=(Table(("system",), columns, rows),), plots=plots)


def _amount(value: float | None, unit: float) -> Entry:
    return (
        NOTHING if value is None else Entry(f"{value / unit:,.3g}" if value / unit < 1000 else f"{value / unit:,.0f}")
    )


def _cost_plot(
    results: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]], metric: str, column: str
) -> Plot | None:
    """Draw a metric against the parameters; None where fewer than two systems have both."""
    look = metric_look(metric)
    points = {
        name: (cost["parameters"] / 1e6, results["systems"][name]["scores"][column][metric] * look.scale)
        for name, cost in found.items()
        if cost["parameters"] and results["systems"][name]["scores"][column][metric] is not None
    }
    if len(points) < 2:
        return None
    with canvas(height=3.4) as (figure, (axes,)):
        for (name, (size, score)), how in zip(points.items(), itertools.cycle(distinct_looks()), strict=False):
            axes.plot([size], [score], how.marker, color=how.color, markersize=8)
            axes.annotate(name, (size, score), (8, 4), textcoords="offset points", color=INK, fontsize=9.5)
        axes.set_xscale("log")
        axes.margins(x=0.25, y=0.2)
        axes.set(xlabel="parameters (millions)", ylabel=f"{metric_label(metric)}, {column}", title="Quality and size")
        return finish(figure, "cost", f"{metric_label(metric)} ({column}) against the number of parameters.")


def columns_of(results: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the directions and, where there are several, the average."""
    directions = tuple(results["directions"])
    return (*directions, AVERAGE) if len(directions) > 1 else directions


def shown_metrics(results: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the metrics that were computed."""
    return tuple(metric for metric in results["metrics"] if metric not in results["skipped"])


def row_of(results: Mapping[str, Any], name: str, entries: Sequence[Entry], *names: str) -> Row:
    """Return a system's row with its role."""
    roles = [role for role in ("baseline", "teacher") if name == results[role]]
    return Row((name, *names), tuple(entries), " ".join(roles))


def score_entry(results: Mapping[str, Any], name: str, column: str, metric: str) -> Entry:
    """Return a score with its interval, its difference to the baseline and the mark of the test.

    The teacher takes no part in the best of a column, for it nearly always wins.
    """
    everyone = {system: entry["scores"][column][metric] for system, entry in results["systems"].items()}
    value, baseline = everyone[name], results["baseline"]
    if value is None:
        return NOTHING
    rivals = [score for system, score in everyone.items() if score is not None and system != results["teacher"]]
    best = len(rivals) > 1 and name != results["teacher"] and value == best_of(metric, rivals)
    test = results["significance"].get(name, {}).get(column, {}).get(metric, {})
    spread = score_text(metric, test["ci"]) if test.get("ci") is not None else ""
    shown = score_text(metric, value)
    if baseline is None or name == baseline or everyone[baseline] is None:
        return Entry(shown, spread, best=best)
    difference = value - everyone[baseline]
    significant = is_significant(test.get("p_holm"), test.get("low"), test.get("high"))
    return Entry(
        shown,
        spread,
        mark=significance_mark(metric, difference, significant, metric_look(metric).digits),
        small=score_text(metric, difference, sign=True),
        best=best,
        hint=_hint(test, metric_look(metric).scale),
    )


def _hint(test: Mapping[str, Any], scale: float) -> str:
    """Return what hovering over a score tells of its test."""
    if test.get("p") is None:
        return ""
    low, high = (number(test[end] * scale, 2) for end in ("low", "high"))
    return f"95 % interval of the difference {low} to {high}, p = {test['p']:.4f}, corrected {test['p_holm']:.4f}"
