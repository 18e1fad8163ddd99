"""The scores of parts of the test set: domains, documents, short and long sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llamafactory_sekd.evaluation.score_cells import plain_entry, row_of, shown_metrics
from llamafactory_sekd.reporting.document import Column, Entry, Section, Table
from llamafactory_sekd.reporting.metric_labels import metric_label, metric_look, number


def parts_section(results: Mapping[str, Any]) -> Section:
    """Show the scores by the length of the source and, where the test set knows them, by domain and by document."""
    note = (
        "In brackets: how many sentences a part has; corpus scores of few sentences vary a lot. Length is that of the "
        "source in words; where a language writes no spaces, two characters count as one."
    )
    tables = [*_tables(results, "by_domain", "domain"), *_documents(results), *_tables(results, "by_length", "length")]
    known = [what for key, what in (("by_domain", "domain"), ("by_document", "document")) if results[key]]
    title = f"By {', '.join(known)} and length" if known else "By length"
    if results["by_document"]:
        note += " By document: mean ± standard deviation of the documents' own scores."
    return Section(title, note, tables=tuple(tables))


def _tables(results: Mapping[str, Any], key: str, what: str) -> Iterator[Table]:
    """Yield a table for each direction and metric; the first metric's is open, the others fold."""
    for direction, parts in results[key].items():
        for place, metric in enumerate(shown_metrics(results)):
            columns = tuple(Column(f"{name or 'unnamed'} ({one['sentences']:,})") for name, one in parts.items())
            rows = tuple(
                row_of(results, name, [plain_entry(one["scores"][name][metric], metric) for one in parts.values()])
                for name in results["systems"]
            )
            title = f"{metric_label(metric)} by {what}, {direction}"
            yield Table(("system",), columns, rows, title, folded=place > 0)


def _documents(results: Mapping[str, Any]) -> Iterator[Table]:
    for direction, found in results["by_document"].items():
        columns = tuple(Column(metric_label(metric)) for metric in shown_metrics(results))
        rows = tuple(
            row_of(results, name, [_spread(scores[metric], metric) for metric in shown_metrics(results)])
            for name, scores in found["scores"].items()
        )
        yield Table(("system",), columns, rows, f"By document, {direction} ({found['documents']:,} documents)")


def _spread(found: Mapping[str, float], metric: str) -> Entry:
    look = metric_look(metric)
    return Entry(number(found["mean"] * look.scale, look.digits), number(found["sd"] * look.scale, look.digits))
