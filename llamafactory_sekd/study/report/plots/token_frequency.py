"""Difficulty and hard share by the frequency of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llamafactory_sekd.reporting.document import Plot
from llamafactory_sekd.reporting.figures import Look, canvas, finish, name_below
from llamafactory_sekd.study.report.cells import Group, Summary


_LABELS = {"difficulty": ("mean difficulty d (nats)", 1.0), "hard": ("hard tokens (%)", 100.0)}


def token_plot(
    sizes: Sequence[int],
    means: Mapping[Group, Mapping[str, Sequence[Summary | None]]],
    names: Mapping[Group, str],
    looks: Mapping[Group, Look],
) -> Plot:
    """Draw both metrics of each group over the classes of tokens.

    Args:
        sizes: how many different tokens each class has.
        means: as in :class:`~llamafactory_sekd.study.report.token_tables.TokenClasses`.
        names, looks: of these groups.
    """
    with canvas(panels=2, columns=2, height=3.4) as (figure, panels):
        for axes, (metric, (label, scale)) in zip(panels, _LABELS.items(), strict=True):
            for group, by_metric in means.items():
                values = [scale * one.mean if one is not None else float("nan") for one in by_metric[metric]]
                look = looks[group]
                axes.plot(values, color=look.color, marker=look.marker, linestyle=look.line)
            axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
            axes.set(xlabel="different tokens in each fifth of the text", ylabel=label)
        name_below(figure, {names[group]: look for group, look in looks.items()})
        caption = "Difficulty and hard share over the training, from the most frequent to the rarest tokens."
        return finish(figure, "tokens", caption)
