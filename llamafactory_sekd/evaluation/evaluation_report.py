"""The results of an evaluation for people: in the terminal, as Markdown, as HTML and as LaTeX."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sacrebleu.metrics.chrf import CHRF

from llamafactory_sekd.evaluation.evaluation_results import Evaluated
from llamafactory_sekd.evaluation.evaluation_tables import (
    costs_section,
    guards_section,
    noticed_by_people,
    parts_section,
    score_sections,
    significance_section,
    similarity_section,
)
from llamafactory_sekd.files import write_json
from llamafactory_sekd.reporting.document import (
    Column,
    Document,
    Entry,
    Line,
    Passage,
    Row,
    Section,
    Span,
    Table,
    write_document,
)
from llamafactory_sekd.reporting.metric_labels import MARKS, metric_label
from llamafactory_sekd.reporting.terminal import print_document


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
        *score_sections(results),
        noticed_by_people(results),
        significance_section(results),
        parts_section(results),
        costs_section(results),
        similarity_section(results),
        guards_section(results),
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
    signatures = texts_table("Signatures", ("direction", "metric"), _triples(results["signatures"]))
    prompts = texts_table("Prompts", ("system", "key"), _triples(results["prompts"]))
    versions = texts_table("Versions", ("package",), list(results["versions"].items()))
    prints = texts_table(
        "Fingerprints of the translations", ("system", "direction"), _triples(results["fingerprints"])
    )
    note = "What it takes to repeat this evaluation; results.json in this folder has every figure at full precision."
    return Section(
        "How this was made", note, tables=(signatures, *([prompts] if prompts.rows else []), versions, prints)
    )


def texts_table(title: str, heads: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> Table:
    """Return a folded table of texts to copy, each with the names before it; its column is named after its title."""
    name = title.split()[0].lower().removesuffix("s")
    return Table(
        heads,
        (Column(name, is_code=True),),
        tuple(Row(tuple(map(str, names)), (Entry(str(text)),)) for *names, text in rows),
        title,
        folded=True,
    )


EXAMPLES = 20


@dataclass(frozen=True)
class Output:
    """One system's translation of an example, with its sentence chrF2 (0 to 100) against the reference."""

    system: str
    text: str
    chrf: float


@dataclass(frozen=True)
class Example:
    """A sentence of the test set; ``number`` is its line, counted from 1. The best output comes first."""

    direction: str
    number: int
    source: str
    reference: str
    outputs: tuple[Output, ...]

    @property
    def spread(self) -> float:
        """Return how far the systems are apart in sentence chrF2; of a single one, how far the reference is."""
        return (self.outputs[0].chrf if len(self.outputs) > 1 else 100.0) - self.outputs[-1].chrf


def most_different(data: Evaluated) -> list[Example]:
    """Return the :data:`EXAMPLES` sentences with the widest spread of sentence chrF2 among the systems.

    Of a single system they are those with the lowest sentence chrF2. Every direction has its part, so that one with
    noisy references does not take all places; no source appears twice in a direction.
    """
    by_direction = [_by_spread(data, direction) for direction in data.test_sets]
    chosen: list[Example] = []
    for row in range(max(map(len, by_direction))):
        chosen += [examples[row] for examples in by_direction if row < len(examples)]
    return sorted(chosen[:EXAMPLES], key=lambda example: (-example.spread, example.direction, example.number))


def _by_spread(data: Evaluated, direction: object) -> list[Example]:
    test_set = data.test_sets[direction]  # type: ignore[index]
    lines = {name: by_direction[direction].lines for name, by_direction in data.hypotheses.items()}  # type: ignore[index]
    metric = CHRF()
    examples: list[Example] = []
    for index, (source, reference) in enumerate(zip(test_set.sources, test_set.references, strict=True)):
        texts = {name: system_lines[index] for name, system_lines in lines.items()}
        if len(texts) > 1 and len(set(texts.values())) == 1:
            continue
        scores = {text: metric.sentence_score(text, [reference]).score for text in set(texts.values())}
        outputs = [Output(name, text, scores[text]) for name, text in texts.items()]
        outputs.sort(key=lambda output: -output.chrf)
        examples.append(Example(str(direction), index + 1, source, reference, tuple(outputs)))
    examples.sort(key=lambda example: (-example.spread, example.number))
    once = {example.source: example for example in reversed(examples)}
    return [example for example in examples if once[example.source] is example][:EXAMPLES]
