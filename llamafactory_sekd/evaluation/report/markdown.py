"""``report.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llamafactory_sekd.evaluation.report.view import GUARD_LABELS, METRIC_LABELS, View


# What Markdown and the HTML inside it would act on.
_ESCAPES = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]#|~"} | {"<": "&lt;", "&": "&amp;"})


def escape(text: str) -> str:
    """Return ``text`` so that Markdown shows it as it is."""
    return text.translate(_ESCAPES)


def render_markdown(view: View) -> str:
    """Return the whole report as GitHub-flavoured Markdown."""
    results = view.results
    parts = [f"# Evaluation on {escape(results['task'])}", _scores(view, view.main_metrics)]
    if results["baseline"] is not None:
        parts.append(
            f"In brackets: difference to the baseline **{escape(results['baseline'])}**; † significant at p < 0.05 "
            "(BLEU and chrF2: paired bootstrap, 1,000 samples; COMET: paired t-test)."
        )
    for metric, reason in results["skipped"].items():
        parts.append(f"{METRIC_LABELS[metric]} was skipped: {escape(reason)}")
    if view.other_metrics:
        parts += [f"## {METRIC_LABELS[view.other_metrics[0]]}", _scores(view, view.other_metrics)]
    if view.similarity:
        parts += [f"## Similarity to the teacher ({escape(results['teacher'])})", _similarity(view)]
    parts += ["## Guards", _guards(view)]
    if view.examples:
        parts += ["## Where the systems differ most", *_examples(view)]
    parts += ["## Signatures and versions", _signatures(view)]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Return a table of cells that are Markdown already; its first ``texts`` columns hold words, the rest figures."""
    lines = [head, [*["---"] * texts, *["---:"] * (len(head) - texts)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _scores(view: View, metrics: Sequence[str]) -> str:
    head = ["system", *(f"{column} {METRIC_LABELS[metric]}" for column in view.columns for metric in metrics)]
    rows = []
    for row in view.rows:
        cells = []
        for column in view.columns:
            for metric in metrics:
                cell = row.cells[column][metric]
                value = f"**{cell.text}**" if cell.best else cell.text
                cells.append(f"{value} ({cell.delta_text})" if cell.delta is not None else value)
        rows.append([escape(row.system), *cells])
    return table(head, rows)


def _similarity(view: View) -> str:
    rows = [
        [escape(name), *("–" if values[column] is None else f"{values[column]:.1f}" for column in view.columns)]
        for name, values in view.similarity.items()
    ]
    return "SacreBLEU with the teacher's translations as references.\n\n" + table(["system", *view.columns], rows)


def _guards(view: View) -> str:
    rows = [
        [
            escape(name),
            direction,
            *(f"**{cell.text}**" if cell.alarming else cell.text for cell in cells.values()),
        ]
        for direction, systems in view.guards.items()
        for name, cells in systems.items()
    ]
    return table(["system", "direction", *GUARD_LABELS.values()], rows)


def _examples(view: View) -> list[str]:
    blocks = []
    for example in view.examples:
        lines = [
            f"**{example.direction}, sentence {example.number}**",
            f"- source: {escape(example.source)}",
            f"- reference: {escape(example.reference)}",
            *(
                f"- {escape(output.system)} (chrF2 {output.chrf:.0f}): {escape(output.text) or '*empty*'}"
                for output in example.outputs
            ),
        ]
        blocks.append("\n".join([lines[0], "", *lines[1:]]))
    return blocks


def _signatures(view: View) -> str:
    lines = [
        f"- {direction} {metric}: `{signature}`"
        for direction, signatures in view.results["signatures"].items()
        for metric, signature in signatures.items()
    ]
    versions = ", ".join(f"{package} {version}" for package, version in view.results["versions"].items())
    return "\n".join([*lines, f"- {escape(versions)}"])
