"""The results of an evaluation for people: in the terminal, as Markdown, as HTML and as LaTeX."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llamafactory_sekd.evaluation.results import Evaluated
from llamafactory_sekd.evaluation.sentence_examples import Example, most_different
from llamafactory_sekd.evaluation.significance import SAMPLES, is_significant
from llamafactory_sekd.files import write_atomic, write_json
from llamafactory_sekd.reporting.document import Column, Document, Entry, Line, Passage, Row, Section, Span, Table
from llamafactory_sekd.reporting.html import render_html
from llamafactory_sekd.reporting.latex import render_latex
from llamafactory_sekd.reporting.markdown import render_markdown
from llamafactory_sekd.reporting.metric_labels import (
    AVERAGE,
    GUARD_LABELS,
    MARKS,
    METRIC_LABELS,
    METRIC_SCALES,
    guard_is_alarming,
    number,
    p_text,
    significance_mark,
)
from llamafactory_sekd.reporting.terminal import print_document


NOTHING = Entry("–")


def write_report(data: Evaluated, results: dict[str, Any]) -> None:
    """Write ``results.json`` and the report in its three forms into ``save_dir`` and print the main tables."""
    folder = data.settings.save_dir
    write_json(folder / "results.json", results)
    document = build_document(data, results)
    write_atomic(folder / "report.md", render_markdown(document))
    write_atomic(folder / "report.tex", render_latex(document))
    write_atomic(folder / "report.html", render_html(document))
    print_document(document)
    if results["baseline"] is not None:
        print(f"± 95 % interval; in brackets: difference to {results['baseline']}. {MARKS}.")
    print(f"Report: {folder / 'report.html'}")


def build_document(data: Evaluated, results: dict[str, Any]) -> Document:
    """Put ``results`` (the contents of results.json) into the order and the words of the report."""
    sections = [
        *_scores(results),
        _significance(results),
        _similarity(results),
        _guards(results),
        _examples(data),
        _origin(results),
    ]
    return Document(
        title=f"Evaluation on {results['task']}",
        facts=tuple(_facts(results)),
        sections=tuple(section for section in sections if section is not None),
    )


def _facts(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for direction, test_set in results["test_sets"].items():
        yield direction, f"{test_set['sentences']:,} sentences"
    yield "template", str(results["template"])
    beams = results["decoding"]["num_beams"]
    yield "decoding", f"{beams} beams" if beams > 1 else "greedy"
    yield "new tokens at most", str(results["decoding"]["max_new_tokens"])
    for name, metrics in results.get("interference", {}).items():
        shown = ", ".join(METRIC_LABELS[metric] for metric in metrics)
        yield (
            "metric interference",
            f"{name} was trained on text that {shown} or a relative chose: trust other metrics",
        )


def columns_of(results: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the directions and, where there are several, the average."""
    directions = tuple(results["directions"])
    return (*directions, AVERAGE) if len(directions) > 1 else directions


def _shown_metrics(results: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(metric for metric in results["metrics"] if metric not in results["skipped"])


def _scores(results: Mapping[str, Any]) -> Iterator[Section]:
    """Yield the paper's table, and chrF2 in a table of its own where the metrics of the paper are there."""
    metrics = _shown_metrics(results)
    main = tuple(metric for metric in metrics if metric != "chrf") or metrics
    skipped = [f"{METRIC_LABELS[metric]} was skipped: {reason}" for metric, reason in results["skipped"].items()]
    yield Section("Scores", _note(results), " ".join(skipped), (_score_table(results, main),), main=True)
    others = tuple(metric for metric in metrics if metric not in main)
    if others:
        note = "A score over characters, more tolerant of rich morphology than BLEU."
        title = METRIC_LABELS[others[0]]
        yield Section(title, note, tables=(_score_table(results, others),), main=True)


def _note(results: Mapping[str, Any]) -> str:
    note = ""
    if results["baseline"] is not None:
        note = (
            f"± is the 95 % interval of a bootstrap with {SAMPLES:,} samples. The smaller figures are differences to "
            f"the baseline {results['baseline']}. {MARKS}; BLEU and chrF2 by paired bootstrap, COMET by a paired "
            "t-test. "
        )
    note += "The best score of a column is bold"
    note += ", the teacher aside." if results["teacher"] is not None else "."
    return note + (" COMET is shown times 100." if "comet" in _shown_metrics(results) else "")


def _score_table(results: Mapping[str, Any], metrics: Sequence[str]) -> Table:
    pairs = [(column, metric) for column in columns_of(results) for metric in metrics]
    columns = tuple(Column(METRIC_LABELS[metric], column) for column, metric in pairs)
    rows = (_row(results, name, [score_entry(results, name, *pair) for pair in pairs]) for name in results["systems"])
    return Table(("system",), columns, tuple(rows), title=results["task"])


def _row(results: Mapping[str, Any], name: str, entries: Sequence[Entry], *names: str) -> Row:
    roles = [role for role in ("baseline", "teacher") if name == results[role]]
    return Row((name, *names), tuple(entries), " ".join(roles))


def score_entry(results: Mapping[str, Any], name: str, column: str, metric: str) -> Entry:
    """Return a score with its interval, its difference to the baseline and the mark of the test.

    The teacher takes no part in the best of a column, for it nearly always wins.
    """
    scale = METRIC_SCALES[metric]
    everyone = {system: entry["scores"][column][metric] for system, entry in results["systems"].items()}
    value, baseline = everyone[name], results["baseline"]
    if value is None:
        return NOTHING
    rivals = [score for system, score in everyone.items() if score is not None and system != results["teacher"]]
    best = len(rivals) > 1 and name != results["teacher"] and value == max(rivals)
    test = results["significance"].get(name, {}).get(column, {}).get(metric, {})
    spread = number(test["ci"] * scale, 1) if test.get("ci") is not None else ""
    if baseline is None or name == baseline or everyone[baseline] is None:
        return Entry(number(value * scale, 1), spread, best=best)
    difference = value - everyone[baseline]
    return Entry(
        number(value * scale, 1),
        spread,
        mark=significance_mark(difference * scale, is_significant(test.get("p"), difference), 1),
        small=number(difference * scale, 1, sign=True),
        best=best,
        hint=f"p = {test['p']:.4f}" if test.get("p") is not None else "",
    )


def _significance(results: Mapping[str, Any]) -> Section | None:
    """List p of every test: hovering over a score does not print."""
    if len(results["significance"]) < 2:
        return None
    pairs = [(column, metric) for column in results["directions"] for metric in _shown_metrics(results)]
    rows = tuple(
        _row(results, name, [Entry(p_text(_p(results, name, *pair))) for pair in pairs])
        for name in results["significance"]
        if name != results["baseline"]
    )
    columns = tuple(Column(f"p, {METRIC_LABELS[metric]}", column) for column, metric in pairs)
    note = f"p of the paired tests against the baseline {results['baseline']}; nothing is corrected for their number."
    return Section("Significance", note, tables=(Table(("system",), columns, rows),))


def _p(results: Mapping[str, Any], name: str, column: str, metric: str) -> float | None:
    """Return p, None for equal scores: sacrebleu's bootstrap has 1/1001 for them, which says nothing."""
    own, base = (results["systems"][one]["scores"][column][metric] for one in (name, results["baseline"]))
    return None if own == base else results["significance"][name][column].get(metric, {}).get("p")


def _similarity(results: Mapping[str, Any]) -> Section | None:
    found = {name: entry["similarity"] for name, entry in results["systems"].items() if entry["similarity"]}
    if not found:
        return None
    columns = columns_of(results)
    rows = tuple(
        _row(results, name, [_similarity_entry(values[column]) for column in columns])
        for name, values in found.items()
    )
    note = f"BLEU with the translations of {results['teacher']} as references: how closely a student follows it."
    table = Table(("system",), tuple(Column("BLEU", column) for column in columns), rows)
    return Section("Similarity to the teacher", note, tables=(table,))


def _similarity_entry(value: float | None) -> Entry:
    return NOTHING if value is None else Entry(number(value, 1), bar=value / 100)


def _guards(results: Mapping[str, Any]) -> Section:
    rows = tuple(
        _row(results, name, [_guard(guard, value) for guard, value in entry["guards"][direction].items()], direction)
        for direction in results["directions"]
        for name, entry in results["systems"].items()
    )
    note = (
        "Shares of the sentences; the length ratio is output by reference, in tokens. What deserves a look is marked."
    )
    table = Table(("system", "direction"), tuple(map(Column, GUARD_LABELS.values())), rows)
    return Section("Guards", note, tables=(table,))


def _guard(name: str, value: float | None) -> Entry:
    if value is None:
        return NOTHING
    text = f"{value:.2f}" if name == "length_ratio" else f"{100 * value:.1f} %"
    return Entry(text, alarm=guard_is_alarming(name, value))


def _examples(data: Evaluated) -> Section | None:
    found = most_different(data)
    if not found:
        return None
    alone = len(data.hypotheses) == 1
    title = "Farthest from the reference" if alone else "Where the systems differ most"
    chosen = "lowest sentence chrF2" if alone else "widest spread of sentence chrF2 among the systems"
    note = f"The sentences with the {chosen}, as shown. Words that differ from the reference are marked."
    return Section(title, note, passages=tuple(map(_passage, found)))


def _passage(example: Example) -> Passage:
    who: dict[str, list[str]] = {}
    for output in example.outputs:  # systems that agree share a line
        who.setdefault(output.text, []).append(output.system)
    scores = {output.text: f"chrF2 {output.chrf:.0f}" for output in example.outputs}
    return Passage(
        f"{example.direction}, sentence {example.number}",
        (
            Line("source", (Span(example.source),)),
            Line("reference", (Span(example.reference),), strong=True),
            *(Line(", ".join(names), differing(text, example.reference), scores[text]) for text, names in who.items()),
        ),
    )


def differing(text: str, reference: str) -> tuple[Span, ...]:
    """Return ``text`` in pieces, with the words marked that are not where the reference has them."""
    words, others = text.split(" "), reference.split(" ")
    spans: list[Span] = []
    matcher = difflib.SequenceMatcher(None, words, others, autojunk=False)
    for kind, start, end, _, _ in matcher.get_opcodes():
        if start < end:
            if spans:
                spans.append(Span(" "))
            spans.append(Span(" ".join(words[start:end]), kind != "equal"))
    return tuple(spans)


def _origin(results: Mapping[str, Any]) -> Section:
    """Tell what anyone needs to repeat it."""
    signatures = _texts(
        "Signatures",
        ("direction", "metric"),
        [
            (direction, metric, signature)
            for direction, by_metric in results["signatures"].items()
            for metric, signature in by_metric.items()
        ],
    )
    versions = _texts("Versions", ("package",), list(results["versions"].items()))
    prints = _texts(
        "Fingerprints of the translations",
        ("system", "direction"),
        [
            (system, direction, fingerprint)
            for system, by_direction in results["fingerprints"].items()
            for direction, fingerprint in by_direction.items()
        ],
    )
    note = "What anyone needs to repeat it; results.json in this folder has every figure at full precision."
    return Section("How this was made", note, tables=(signatures, versions, prints))


def _texts(title: str, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    name = title.split()[0].lower().removesuffix("s")
    return Table(
        heads,
        (Column(name, is_code=True),),
        tuple(Row(tuple(map(str, names)), (Entry(str(text)),)) for *names, text in rows),
        title,
        folded=True,
    )
