"""The results of an evaluation for people: in the terminal, as Markdown, as HTML and as LaTeX."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llamafactory_sekd.evaluation.cost_tables import costs_section
from llamafactory_sekd.evaluation.evaluation_results import Evaluated
from llamafactory_sekd.evaluation.noticed import noticed_entry, noticed_section
from llamafactory_sekd.evaluation.part_tables import parts_section
from llamafactory_sekd.evaluation.score_cells import columns_of, row_of, score_entry, shown_metrics
from llamafactory_sekd.evaluation.scores import SURFACE_METRICS
from llamafactory_sekd.evaluation.sentence_examples import Example, most_different
from llamafactory_sekd.evaluation.significance import SAMPLES, TRIALS
from llamafactory_sekd.files import write_json
from llamafactory_sekd.reporting.document import (
    NOTHING,
    Column,
    Document,
    Entry,
    Line,
    Passage,
    Row,
    Section,
    Span,
    Table,
)
from llamafactory_sekd.reporting.document_files import write_document
from llamafactory_sekd.reporting.metric_labels import (
    GUARD_LABELS,
    MARKS,
    guard_is_alarming,
    metric_label,
    metric_look,
    number,
    p_text,
)
from llamafactory_sekd.reporting.terminal import print_document


# Columns of figures of more than two metrics that fit on a page side by side.
WIDEST = 8


def write_report(data: Evaluated, results: dict[str, Any]) -> None:
    """Write ``results.json`` and the report in its three forms into ``save_dir`` and print the main tables."""
    folder = data.settings.save_dir
    write_json(folder / "results.json", results)
    document = build_document(data, results)
    write_document(document, folder)
    scores, *others = document.sections
    # The log has named the metrics that are skipped, before the translations.
    print_document(replace(document, sections=(replace(scores, alarm=" ".join(results["notes"])), *others)))
    if results["baseline"] is not None:
        print(f"± 95 % interval; in parentheses: difference to {results['baseline']}. {MARKS}.")
    print(f"Report: {folder / 'report.html'}")


def build_document(data: Evaluated, results: dict[str, Any]) -> Document:
    """Put ``results`` (the contents of results.json) into the order and the words of the report."""
    sections = [
        *_scores(results),
        _noticed(results),
        _significance(results),
        parts_section(results),
        costs_section(results),
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
        several = f", {test_set['references']} references" if test_set["references"] > 1 else ""
        yield direction, f"{test_set['sentences']:,} sentences{several}"
    for origin in dict.fromkeys(test_set["origin"] for test_set in results["test_sets"].values()):
        if origin:
            yield "from", origin
    yield "template", str(results["template"])
    beams = results["decoding"]["num_beams"]
    yield "decoding", f"{beams} beams" if beams > 1 else "greedy"
    yield "new tokens at most", str(results["decoding"]["max_new_tokens"])
    for name, metrics in results.get("interference", {}).items():
        shown = ", ".join(metric_label(metric) for metric in metrics)
        yield (
            "metric interference",
            f"{name} was trained on text that {shown} or a relative chose: trust other metrics",
        )


def _scores(results: Mapping[str, Any]) -> Iterator[Section]:
    """Yield the paper's table, and chrF2 in a table of its own where the metrics of the paper are there."""
    metrics = shown_metrics(results)
    main = tuple(metric for metric in metrics if metric != "chrf") or metrics
    left_out = [f"{metric_label(metric)} was skipped: {reason}" for metric, reason in results["skipped"].items()]
    alarm = " ".join([*left_out, *results["notes"]])
    if not main:
        yield Section("Scores", "No metric of this evaluation can run; see the guards.", alarm, main=True)
        return
    yield Section("Scores", _note(results), alarm, tuple(_score_tables(results, main)), main=True)
    others = tuple(metric for metric in metrics if metric not in main)
    if others:
        note = "A score over characters, more tolerant of rich morphology than BLEU."
        yield Section(metric_label(others[0]), note, tables=(_score_table(results, others),), main=True)


def _note(results: Mapping[str, Any]) -> str:
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
    pairs = [(column, metric) for column in columns_of(results) for metric in metrics]
    columns = tuple(Column(metric_label(metric), column) for column, metric in pairs)
    rows = (
        row_of(results, name, [score_entry(results, name, *pair) for pair in pairs]) for name in results["systems"]
    )
    return Table(("system",), columns, tuple(rows), title=results["task"])


def _significance(results: Mapping[str, Any]) -> Section | None:
    """List p of every test: hovering over a score does not print."""
    if len(results["significance"]) < 2:
        return None
    pairs = [(column, metric) for column in columns_of(results) for metric in shown_metrics(results)]
    rows = tuple(
        row_of(results, name, [_p_entry(results, name, *pair) for pair in pairs])
        for name in results["significance"]
        if name != results["baseline"]
    )
    columns = tuple(Column(f"p, {metric_label(metric)}", column) for column, metric in pairs)
    table = Table(("system",), columns, rows)
    trials = f"{SAMPLES:,} resamples" if results["test"] == "paired_bs" else f"{TRIALS:,} trials"
    note = (
        f"p of the paired tests against the baseline {results['baseline']} ({trials}), corrected for the number of "
        "systems by Holm; below it, p of the test alone."
    )
    return Section("Significance", note, tables=(table,))


def _noticed(results: Mapping[str, Any]) -> Section | None:
    found = results["noticed"]
    known = {metric for one in found.values() for shares in one.values() for metric in shares}
    shown = [metric for metric in shown_metrics(results) if metric in known]
    if not shown:
        return None
    pairs = [(column, metric) for column in columns_of(results) for metric in shown]
    columns = tuple(Column(metric_label(metric), column) for column, metric in pairs)
    shares = {
        name: [noticed_entry(one[column].get(metric)) for column, metric in pairs] for name, one in found.items()
    }
    return noticed_section(
        Table(("system",), columns, tuple(row_of(results, name, entries) for name, entries in shares.items()))
    )


def _p_entry(results: Mapping[str, Any], name: str, column: str, metric: str) -> Entry:
    """Return p, none for equal scores: sacrebleu's bootstrap has 1/1001 for them, which says nothing."""
    own, base = (results["systems"][one]["scores"][column][metric] for one in (name, results["baseline"]))
    test = results["significance"][name][column].get(metric, {})
    if own == base or test.get("p") is None:
        return NOTHING
    several = len(results["significance"]) > 2
    return Entry(p_text(test["p_holm"]), small=p_text(test["p"]) if several else "")


def _similarity(results: Mapping[str, Any]) -> Section | None:
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


def _guards(results: Mapping[str, Any]) -> Section:
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


def _examples(data: Evaluated) -> Section | None:
    found = most_different(data) if all(test_set.references for test_set in data.test_sets.values()) else []
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


def _triples(nested: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str, str]]:
    return [(outer, inner, value) for outer, values in nested.items() for inner, value in values.items()]


def _origin(results: Mapping[str, Any]) -> Section:
    """Tell what anyone needs to repeat it."""
    signatures = _texts(
        "Signatures",
        ("direction", "metric"),
        _triples(results["signatures"]),
    )
    prompts = _texts(
        "Prompts",
        ("system", "key"),
        _triples(results["prompts"]),
    )
    versions = _texts("Versions", ("package",), list(results["versions"].items()))
    prints = _texts(
        "Fingerprints of the translations",
        ("system", "direction"),
        _triples(results["fingerprints"]),
    )
    note = "What it takes to repeat this evaluation; results.json in this folder has every figure at full precision."
    return Section(
        "How this was made", note, tables=(signatures, *([prompts] if prompts.rows else []), versions, prints)
    )


def _texts(title: str, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    name = title.split()[0].lower().removesuffix("s")
    return Table(
        heads,
        (Column(name, is_code=True),),
        tuple(Row(tuple(map(str, names)), (Entry(str(text)),)) for *names, text in rows),
        title,
        folded=True,
    )
