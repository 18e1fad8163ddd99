"""Curves over the training steps: what the gate does, and how the systems learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamafactory_sekd.reporting.document import Plot
from llamafactory_sekd.reporting.figures import BASELINE, Look, canvas, finish, name_below
from llamafactory_sekd.study.report.cells import Group
from llamafactory_sekd.study.report.history import Curve, Histories


@dataclass(frozen=True)
class Panel:
    """One metric over the steps, times ``factor``; ``relative`` takes the baseline's off, seed by seed."""

    metric: str
    title: str
    factor: float = 1.0
    relative: bool = False


GATE = (
    Panel("kd/hard_ratio", "hard tokens (%)", 100.0),
    Panel("kd/difficulty", "mean difficulty d (nats)"),
    Panel("kd/gamma", "Γ, where it adapts"),
    Panel("kd/hard_scale", "factor of the hard loss"),
)
LEARNING = (
    Panel("kd/ce", "NLL, training"),
    Panel("eval_kd/ce", "NLL, validation"),
    Panel("kd/agreement", "agreement (%), training", 100.0),
    Panel("eval_kd/agreement", "agreement (%), validation", 100.0),
    Panel("loss", "loss, training"),
    Panel("eval_loss", "loss, validation"),
    Panel("eval_kd/ce", "NLL, validation, to the baseline", relative=True),
    Panel("eval_kd/agreement", "agreement, validation, to the baseline", 100.0, relative=True),
)


@dataclass(frozen=True)
class Runs:
    """What one plot shows: groups with their names, baselines and looks, where the logs are, and a title."""

    names: Mapping[Group, str]
    baselines: Mapping[Group, Group | None]
    looks: Mapping[Group, Look]
    histories: Histories
    title: str = ""

    def curves(self, panel: Panel) -> dict[Group, Curve]:
        """Return the curve of each group that has one."""
        found = {group: self._curve(panel, group) for group in self.names}
        return {group: curve for group, curve in found.items() if curve is not None}

    def _curve(self, panel: Panel, group: Group) -> Curve | None:
        if panel.relative:
            baseline = self.baselines[group]
            return self.histories.curve(group, panel.metric, baseline) if baseline is not None else None
        return self.histories.curve(group, panel.metric)


def gate_plot(name: str, runs: Runs) -> Plot | None:
    """Draw the share of hard tokens and the mean difficulty of equation 5, and what adapts."""
    caption = "Share of hard tokens and mean difficulty d = KL(y~ ‖ q) during training; mean over seeds, ± one sd."
    return _plot(f"gate{name}", caption, GATE, runs)


def learning_plot(name: str, runs: Runs) -> Plot | None:
    """Draw NLL, agreement and loss on the training and on the validation text, and differences to the baseline."""
    caption = "NLL, agreement and loss during training; mean over seeds, ± one sd."
    return _plot(f"learning{name}", caption, LEARNING, runs)


def _plot(name: str, caption: str, panels: Sequence[Panel], runs: Runs) -> Plot | None:
    found = {panel: curves for panel in panels if (curves := runs.curves(panel))}
    if not found:
        return None
    with canvas(len(found), columns=2, height=2.3) as (figure, all_axes):
        for axes, (panel, curves) in zip(all_axes, found.items(), strict=True):
            for group, curve in curves.items():
                _draw(axes, curve, panel.factor, runs.looks[group], len(curves))
            if panel.relative:
                axes.axhline(0, color=BASELINE, linewidth=1.2)
            axes.set_title(panel.title)
            axes.set_xlabel("step")
        drawn = [group for group in runs.names if any(group in curves for curves in found.values())]
        name_below(figure, {runs.names[group]: runs.looks[group] for group in drawn})
        if runs.title:
            figure.suptitle(runs.title, fontsize=11)
            caption = f"{runs.title}: {caption}"
        return finish(figure, name, caption)


def _draw(axes: Any, curve: Curve, factor: float, look: Look, lines: int) -> None:
    means = [factor * summary.mean for summary in curve.summaries]
    spread = [factor * (summary.sd or 0.0) for summary in curve.summaries]
    dots = look.marker if len(means) < 12 else ""
    axes.plot(curve.steps, means, color=look.color, linestyle=look.line, marker=dots, markersize=4, linewidth=1.5)
    low = [mean - sd for mean, sd in zip(means, spread, strict=True)]
    high = [mean + sd for mean, sd in zip(means, spread, strict=True)]
    axes.fill_between(curve.steps, low, high, color=look.color, alpha=0.13 if lines < 5 else 0.06, linewidth=0)


def point_looks(groups: Sequence[Group]) -> dict[Group, Look]:
    """Color the points of one system from dark to light, in the matrix's order."""
    from matplotlib import colormaps

    shades = colormaps["viridis"]
    last = max(1, len(groups) - 1)
    colors = [tuple(round(255 * part) for part in shades(0.88 * index / last)[:3]) for index in range(len(groups))]
    return {
        group: Look("#{:02x}{:02x}{:02x}".format(*color), "o", "-")
        for group, color in zip(groups, colors, strict=True)
    }
