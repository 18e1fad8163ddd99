"""``report.html``: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from llamafactory_sekd.evaluation.report.view import AVERAGE, GUARD_LABELS, METRIC_LABELS, View


def render_html(view: View) -> str:
    """Return the whole report. Every text is escaped, translations above all: they may hold anything."""
    environment = Environment(
        loader=PackageLoader("llamafactory_sekd.evaluation.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    return template.render(
        view=view,
        results=view.results,
        metric_labels=METRIC_LABELS,
        guard_labels=GUARD_LABELS,
        average=AVERAGE,
    )
