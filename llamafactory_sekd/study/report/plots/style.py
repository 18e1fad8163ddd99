"""How all plots look: colors that the color-blind can tell apart, names at the lines, files that never change."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llamafactory_sekd.reporting.document import Plot
from llamafactory_sekd.study.report.cells import Group, Study


# Okabe and Ito's colors without the yellow, which is pale on white, and two dark ones; each has its own mark. When
# they are used up they come again, dashed.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B3A8C", "#7A4A1E")
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


def looks(study: Study) -> dict[str, Look]:
    """Give each system its look: the baseline black, the others colors in the study's order."""
    given = itertools.product(_LINES, zip(_COLOURS, _MARKS, strict=True))
    found: dict[str, Look] = {}
    for system in dict.fromkeys([*study.spec["systems"], *study.systems]):
        if system == study.baseline:
            found[system] = Look(BASELINE, "o", "-")
        elif system == study.teacher:
            found[system] = Look(SOFT, "", ":")
        else:
            line, (color, marker) = next(given)
            found[system] = Look(color, marker, line)
    return found


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


def name_lines(axes: Any, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write each line's name at its right end, beside the axes, in its color, and apart from its neighbors.

    ``ends`` holds (name, y at the end, color). Limits and size of the axes must be final.
    """
    axes.figure.draw_without_rendering()
    bottom, top = axes.bbox.y0, axes.bbox.y1
    gap = 13 * axes.figure.dpi / 72
    order = sorted(range(len(ends)), key=lambda index: ends[index][1])
    wanted = [float(axes.transData.transform((0, ends[index][1]))[1]) for index in order]
    for index, y in zip(order, _apart(wanted, gap, bottom, top), strict=True):
        name, _, color = ends[index]
        axes.annotate(
            name,
            (1.015, (y - bottom) / (top - bottom)),
            xycoords="axes fraction",
            color=color,
            va="center",
            fontsize=9.5,
            annotation_clip=False,
        )


def name_below(figure: Any, names: Mapping[Group, str], looks: Mapping[Group, Look]) -> None:
    """Write one legend for all panels below them, for which the figure grows."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=look.color, linestyle=look.line, marker=look.marker, markersize=4)
        for look in looks.values()
    ]
    # matplotlib takes a leading underscore for "leave it out".
    labels = [f" {names[group]}" if names[group].startswith("_") else names[group] for group in looks]
    longest = max(map(len, labels))
    columns = 4 if longest < 16 else 3 if longest < 34 else 2
    figure.set_figheight(figure.get_figheight() + 0.21 * -(-len(labels) // columns))
    figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5)


def _apart(wanted: Sequence[float], gap: float, bottom: float, top: float) -> list[float]:
    """Return ascending positions at least ``gap`` apart, as near to the ascending ``wanted`` ones as that allows.

    Neighbors that would overlap form a block, which stands where its members wanted to be on average. All of it is
    moved into ``bottom`` to ``top`` where there is room.
    """
    blocks: list[tuple[float, int]] = []  # sum of the first position that each member wants, members
    for index, y in enumerate(wanted):
        total, count = y - gap * index, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            before, members = blocks.pop()
            total, count = total + before, count + members
        blocks.append((total, count))
    starts = [total / count for total, count in blocks for _ in range(count)]
    positions = [start + gap * index for index, start in enumerate(starts)]
    if positions and positions[-1] - positions[0] < top - bottom:
        shift = max(0.0, bottom - positions[0]) - max(0.0, positions[-1] - top)
        positions = [position + shift for position in positions]
    return positions
