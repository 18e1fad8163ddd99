"""How all figures look: colors that the color-blind can tell apart, one legend, files that never change."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llamafactory_sekd.reporting.document import Plot


# Okabe and Ito's colors without the yellow, which is pale on white, and two dark ones; each has its own mark. When
# they are used up they come again, dashed.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B3A8C", "#7A4A1E")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<")
_LINES = ("-", "--", "-.", ":")
BASELINE = "#000000"
INK, SOFT, FAINT = "#1c2430", "#5b6675", "#dfe4ea"
# Inches; at 150 dpi a README shows it one to one.
WIDTH, DPI = 7.6, 150
_SETTINGS: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "text.parse_math": False,  # a name may hold dollar signs
    "svg.hashsalt": "sekd",
    "axes.formatter.use_mathtext": False,
}


@dataclass(frozen=True)
class Look:
    """How a system looks in every plot of a study."""

    color: str
    marker: str
    line: Any


def distinct_looks() -> Iterator[Look]:
    """Yield looks of which no two are alike, as many as there are colors times dashes."""
    for line, (color, marker) in itertools.product(_LINES, zip(_COLORS, _MARKS, strict=True)):
        yield Look(color, marker, line)


@contextmanager
def canvas(panels: int = 1, columns: int = 1, *, height: float) -> Iterator[tuple[Any, list[Any]]]:
    """Give a figure and its axes, ``panels`` in rows of ``columns``; ``height`` is that of a row, in inches."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-panels // columns)
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]


def finish(figure: Any, name: str, caption: str) -> Plot:
    """Return the figure in both formats: the same bytes for the same study. Called inside of :func:`canvas`."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI)
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return Plot(name, caption, png.getvalue(), svg.getvalue())


def draw_band(
    axes: Any,
    xs: Sequence[float],
    means: Sequence[float],
    spread: Sequence[float],
    look: Look,
    alpha: float = 0.13,
    **line: Any,
) -> None:
    """Draw a curve, with matplotlib's own keys in ``line``, and ± ``spread`` around it as a band."""
    axes.plot(xs, means, **{"color": look.color, "marker": look.marker, "linestyle": look.line, **line})
    low, high = ([mean + side * sd for mean, sd in zip(means, spread, strict=True)] for side in (-1, 1))
    axes.fill_between(xs, low, high, color=look.color, alpha=alpha, linewidth=0)


def name_below(figure: Any, looks: Mapping[str, Look]) -> None:
    """Write one legend (label to look) for all panels below them, for which the figure grows."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=look.color, linestyle=look.line, marker=look.marker, markersize=4)
        for look in looks.values()
    ]
    # matplotlib takes a leading underscore for "leave it out".
    labels = [f" {label}" if label.startswith("_") else label for label in looks]
    longest = max(map(len, labels))
    columns = 4 if longest < 16 else 3 if longest < 34 else 2
    figure.set_figheight(figure.get_figheight() + 0.21 * -(-len(labels) // columns))
    figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5)


def draw_gate(axes: Any, steps: Sequence[float], hard: Sequence[float], difficulty: Sequence[float]) -> None:
    """Draw what the gate of a run does: hard tokens (shares, 0 to 1) on the left, mean difficulty on the right.

    Args:
        axes: where to; a second pair is laid over them.
        steps: the steps at which both were logged.
        hard: the shares of hard tokens.
        difficulty: the mean difficulties d in nats.
    """
    from matplotlib.ticker import MaxNLocator

    right = axes.twinx()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no half step
    marker = "." if len(steps) < 100 else ""
    (left_line,) = axes.plot(
        steps, [100 * share for share in hard], color=_COLORS[1], marker=marker, label="hard tokens"
    )
    (right_line,) = right.plot(
        steps, difficulty, color=_COLORS[0], linestyle="--", marker=marker, label="mean difficulty"
    )
    axes.set(xlabel="step", ylabel="hard tokens (%)", ylim=(0, 105))  # 100 % is not to lie on the frame
    right.set_ylabel("mean difficulty d (nats)")
    right.set_ylim(0, 1.1 * max(difficulty) or 1)
    handles = [left_line, right_line]
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)


def draw_validation(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Lay the NLL of the validation text over the curve of the loss, whose scale is another one.

    Args:
        axes: where the loss is; a second pair is laid over them.
        points: (step, NLL in nats per token), at least one.
    """
    right = axes.twinx()
    (line,) = right.plot(*zip(*points, strict=True), color=_COLORS[1], linestyle="--", marker=".")
    line.set_label("validation NLL")
    right.grid(visible=False)
    right.set_ylabel("NLL (nats per token)")
    axes.legend(handles=[*axes.get_legend_handles_labels()[0], line])
