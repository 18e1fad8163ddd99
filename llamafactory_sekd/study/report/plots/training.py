"""Curves over the training steps: what the gate does, and how the systems learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamafactory_sekd.study.report.cells import Group, short_names
from llamafactory_sekd.study.report.document import Plot
from llamafactory_sekd.study.report.history import Curve, Histories
from llamafactory_sekd.study.report.plots.style import Look, canvas, finish, name_below


# (metric, name, factor)
GATE = (
    ("kd/hard_ratio", "hard tokens (%)", 100.0),
    ("kd/difficulty", "mean difficulty d (nats)", 1.0),
    ("kd/gamma", "Γ, where it adapts", 1.0),
    ("kd/hard_scale", "factor of the hard loss", 1.0),
)
LEARNING = (
    ("kd/ce", "NLL, training", 1.0),
    ("eval_kd/ce", "NLL, validation", 1.0),
    ("kd/agreement", "agreement (%), training", 100.0),
    ("eval_kd/agreement", "agreement (%), validation", 100.0),
    ("loss", "loss, training", 1.0),
    ("eval_loss", "loss, validation", 1.0),
)
Panel = tuple[str, str, float]


def gate_plot(name: str, groups: Sequence[Group], histories: Histories, looks: Mapping[Group, Look]) -> Plot | None:
    """Draw the share of hard tokens and the mean difficulty of equation 5, and what adapts."""
    caption = "Share of hard tokens and mean difficulty d = KL(y~ ‖ q) during training; mean over seeds, ± one sd."
    return _curves(f"gate{name}", caption, GATE, groups, histories, looks)


def learning_plot(
    name: str, groups: Sequence[Group], histories: Histories, looks: Mapping[Group, Look]
) -> Plot | None:
    """Draw NLL, agreement and loss, on the training and on the validation text."""
    caption = "NLL, agreement and loss during training; mean over seeds, ± one sd."
    return _curves(f"learning{name}", caption, LEARNING, groups, histories, looks)


def _curves(
    name: str,
    caption: str,
    panels: Sequence[Panel],
    groups: Sequence[Group],
    histories: Histories,
    looks: Mapping[Group, Look],
) -> Plot | None:
    found = {panel: _found(panel[0], groups, histories) for panel in panels}
    kept = [panel for panel in panels if found[panel]]
    if not kept:
        return None
    alone = len(groups) > 1 and len({group.system for group in groups}) == 1
    with canvas(len(kept), columns=2, height=2.5) as (figure, all_axes):
        for axes, (metric, title, factor) in zip(all_axes, kept, strict=True):
            for group, curve in found[metric, title, factor].items():
                _draw(axes, curve, factor, looks[group])
            axes.set(title=title, xlabel="step")
        drawn = [group for group in groups if any(group in found[panel] for panel in kept)]
        name_below(figure, short_names(groups), {group: looks[group] for group in drawn})
        if alone:
            figure.suptitle(groups[0].system, fontsize=11)
            caption = f"{groups[0].system}: {caption}"
        return finish(figure, name, caption)


def _found(metric: str, groups: Sequence[Group], histories: Histories) -> dict[Group, Curve]:
    curves = {group: histories.curve(group, metric) for group in groups}
    if metric == "kd/hard_ratio":  # an objective without a gate has none or all of the tokens
        curves = {
            group: curve if curve and any(0 < one.mean < 1 for one in curve.summaries) else None
            for group, curve in curves.items()
        }
    return {group: curve for group, curve in curves.items() if curve is not None}


def _draw(axes: Any, curve: Curve, factor: float, look: Look) -> None:
    means = [factor * summary.mean for summary in curve.summaries]
    spread = [factor * (summary.sd or 0.0) for summary in curve.summaries]
    dots = look.marker if len(means) < 12 else ""
    axes.plot(curve.steps, means, color=look.colour, linestyle=look.line, marker=dots, markersize=4, linewidth=1.5)
    low = [mean - sd for mean, sd in zip(means, spread, strict=True)]
    high = [mean + sd for mean, sd in zip(means, spread, strict=True)]
    axes.fill_between(curve.steps, low, high, color=look.colour, alpha=0.13, linewidth=0)


def point_looks(groups: Sequence[Group]) -> dict[Group, Look]:
    """Colour the points of one system from dark to light, in the matrix's order."""
    from matplotlib import colormaps

    shades = colormaps["viridis"]
    last = max(1, len(groups) - 1)
    colours = [tuple(round(255 * part) for part in shades(0.88 * index / last)[:3]) for index in range(len(groups))]
    return {
        group: Look("#{:02x}{:02x}{:02x}".format(*colour), "o", "-")
        for group, colour in zip(groups, colours, strict=True)
    }
