"""Training: what the gate does, how the systems learn, where they end, what they cost, by what the runs logged."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from llamafactory_sekd.arguments import STAGE, TOKEN_TABLE
from llamafactory_sekd.files import read_json
from llamafactory_sekd.reporting.document import NOTHING, Column, Entry, Plot, Section
from llamafactory_sekd.reporting.figures import BASELINE, Look, canvas, draw_band, finish, name_below
from llamafactory_sekd.reporting.metric_labels import number
from llamafactory_sekd.study.report.cells import (
    Cell,
    Group,
    Study,
    Summary,
    is_number,
    paired_cells,
    short_names,
    summarize,
)
from llamafactory_sekd.study.report.views import LAST_METRICS, MOST_LINES, Views, entry, group_table, summary_table


# Logged points of one curve; more of them are averaged in equal windows.
POINTS = 50


@dataclass(frozen=True)
class Curve:
    """``summaries`` over the seeds at each of ``steps``."""

    steps: tuple[float, ...]
    summaries: tuple[Summary, ...]


class Histories:
    """Read the cells' ``trainer_state.json`` once; a cell without one has no curves."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._logs: dict[str, list[dict[str, Any]]] = {}

    def curve(self, group: Group, metric: str, baseline: Group | None = None) -> Curve | None:
        """Return the curve of a metric at the steps that all seeds have, None without any.

        With ``baseline`` it is the difference to that group, seed by seed.
        """
        if baseline is None:
            seeds = [self._series(cell, metric) for cell in group.cells.values()]
        else:
            pairs = paired_cells(group, baseline)
            seeds = [_minus(self._series(one, metric), self._series(other, metric)) for one, other in pairs]
        seeds = [series for series in seeds if series]
        if not seeds:
            return None
        steps = sorted(set.intersection(*(set(series) for series in seeds)))
        if not steps:
            return None
        windows = _windows(steps)
        means = [[_mean([series[step] for step in window]) for series in seeds] for window in windows]
        summaries = tuple(summary for values in means if (summary := summarize(values)) is not None)
        return Curve(tuple(_mean(window) for window in windows), summaries)

    def _series(self, cell: Cell, metric: str) -> dict[int, float]:
        """Return step -> value. The NLL of the host's SFT, which has no ``kd/*``, is its loss."""
        log = self._log(cell)
        if metric.endswith("kd/ce") and (cell.get("config") or {}).get("stage") != STAGE:
            metric = metric.replace("_kd/ce", "_loss").replace("kd/ce", "loss")
        return {entry["step"]: entry[metric] for entry in log if "step" in entry and is_number(entry.get(metric))}

    def _log(self, cell: Cell) -> list[dict[str, Any]]:
        path = cell.get("history")
        if not path:
            return []
        if path not in self._logs:
            state = read_json(self._root / path)
            self._logs[path] = state.get("log_history", []) if isinstance(state, dict) else []
        return self._logs[path]


def _minus(series: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    return {step: value - other[step] for step, value in series.items() if step in other}


def _windows(steps: Sequence[int]) -> list[Sequence[int]]:
    size = -(-len(steps) // POINTS)
    return [steps[start : start + size] for start in range(0, len(steps), size)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# Each class of tokens makes up about this share of the training's response tokens.
CLASSES = 5
METRICS = ("difficulty", "hard")
_Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class TokenClasses:
    """The tokens of the training text in classes of equal mass, the most frequent first.

    Attributes:
        sizes: how many different tokens each class has.
        means: group -> metric -> class, the mean over the tokens' occurrences, over seeds; absent without a table.
    """

    sizes: tuple[int, ...]
    means: Mapping[Group, Mapping[str, tuple[Summary | None, ...]]]


def token_classes(study: Study, groups: Sequence[Group]) -> TokenClasses | None:
    """Return the means of all groups that have tables; None where no group has one."""
    tables = {group: [_read(study.root, cell) for cell in group.cells.values()] for group in groups}
    tables = {group: found for group, seeds in tables.items() if (found := [table for table in seeds if table])}
    if not tables:
        return None
    # The text is the same for all of them, so one table tells the frequencies.
    counts = {token: row["count"] for token, row in next(iter(tables.values()))[0].items()}
    class_of = _classes(counts)
    sizes = tuple(sum(one == index for one in class_of.values()) for index in range(CLASSES))
    means = {
        group: {
            metric: tuple(
                summarize(_mean_of_class(table, class_of, index, metric) for table in seeds)
                for index in range(CLASSES)
            )
            for metric in METRICS
        }
        for group, seeds in tables.items()
    }
    return TokenClasses(sizes, means)


def _read(root: Path, cell: Cell) -> _Table:
    path = root / cell["model"] / TOKEN_TABLE
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="surrogatepass", newline="") as file:
        return {row["id"]: {key: float(row[key]) for key in ("count", *METRICS)} for row in csv.DictReader(file)}


def _classes(counts: Mapping[str, float]) -> dict[str, int]:
    """Return token -> class. A token belongs where the middle of its mass is."""
    ordered = sorted(counts, key=lambda token: (-counts[token], int(token)))
    ends = accumulate(counts[token] for token in ordered)
    total = sum(counts.values())
    return {token: int(CLASSES * (end - counts[token] / 2) / total) for token, end in zip(ordered, ends, strict=True)}


def _mean_of_class(
    table: Mapping[str, Mapping[str, float]], class_of: Mapping[str, int], index: int, metric: str
) -> float | None:
    rows = [row for token, row in table.items() if class_of.get(token, CLASSES - 1) == index]
    mass = sum(row["count"] for row in rows)
    return sum(row["count"] * row[metric] for row in rows) / mass if mass else None


def training_sections(views: Views) -> Iterator[Section | None]:
    """Yield the sections about training."""
    groups = [group for group in views.groups if group.trained]
    if not groups:
        return
    histories = Histories(views.study.root)
    yield _gate(views, groups, histories)
    yield _tokens(views, groups)
    yield _learning(views, groups, histories)
    yield _cost(views, groups)


def _drawn(
    views: Views, groups: Sequence[Group], histories: Histories, draw: Callable[[str, Runs], Plot | None]
) -> tuple[Plot, ...]:
    """Draw all groups in one plot, or one plot per system where they are too many or a system has several."""
    baselines = {group: views.baseline_of(group) for group in groups}
    by_system = {system: [group for group in groups if group.system == system] for system in views.study.systems}
    looks = {group: views.looks[group.system] for group in groups}
    if len(groups) <= MOST_LINES and all(len(own) <= 1 for own in by_system.values()):
        plots = [draw("", Runs(short_names(groups), baselines, looks, histories))]
    else:
        plots = []
        # A baseline on which the matrix has no effect appears in every system's plot.
        own_baseline = by_system.get(views.study.baseline or "", [])
        reference = own_baseline if len(own_baseline) == 1 else []
        for index, (system, own) in enumerate(by_system.items(), start=1):
            if own and own != reference:
                names = {**short_names(own), **{group: group.system for group in reference}}
                own_looks = {**_point_looks(own), **{group: looks[group] for group in reference}}
                plots.append(draw(f"_{index}", Runs(names, baselines, own_looks, histories, title=system)))
    return tuple(plot for plot in plots if plot is not None)


def _gate(views: Views, groups: Sequence[Group], histories: Histories) -> Section | None:
    plots = _drawn(views, groups, histories, gate_plot)
    note = (
        "Hard are the tokens with d > Γ, or the top K. All objectives of the stage log them, also those that treat "
        "all tokens alike. d depends on λ. Means over response tokens of each logging window, in 50 windows at most."
    )
    return Section("Hard tokens over training", note, plots=plots) if plots else None


def _tokens(views: Views, groups: Sequence[Group]) -> Section | None:
    found = token_classes(views.study, groups)
    if found is None:
        return None
    means = found.means

    def entries(group: Group) -> Iterator[Entry]:
        yield from (entry(one) for one in means[group]["difficulty"])
        yield from (entry(one, 1, 100.0) for one in means[group]["hard"])

    columns = (Column(f"{size:,}", head) for head in ("difficulty d", "hard tokens (%)") for size in found.sizes)
    table = group_table(views.study, list(means), columns, entries)
    note = (
        f"Means over the entire training. The response tokens are divided into {CLASSES} parts of about equal mass by "
        "how frequent their entry of the vocabulary is among them, the most frequent first; a column is named by how "
        f"many different entries its part has. Single tokens are in each run's `{TOKEN_TABLE}`."
    )
    plots: tuple[Plot, ...] = ()
    if len(means) <= MOST_LINES and len({group.system for group in means}) == len(means):
        plots = (_token_plot(views, found),)
    return Section("Rare and frequent tokens in training", note, tables=(table,), plots=plots)


def _learning(views: Views, groups: Sequence[Group], histories: Histories) -> Section | None:
    columns = {
        name: (lambda group, of=of: entry(group.validation(of[0]), of[1], of[2])) for name, of in LAST_METRICS.items()
    }
    # Without an evaluation, it is the study's main table already.
    table = summary_table(views.study, groups, columns) if views.study.directions else None
    plots = _drawn(views, groups, histories, learning_plot)
    if table is None and not plots:
        return None
    note = (
        "The table holds the last evaluation of each run on the validation text. NLL and agreement (how often student "
        "and teacher have the same most likely token) can be compared between systems; losses of different objectives "
        "cannot."
    )
    return Section("Learning curves", note, tables=(table,) if table else (), plots=plots)


def _cost(views: Views, groups: Sequence[Group]) -> Section | None:
    def relative(group: Group) -> Entry:
        baseline = group if group.system == views.study.baseline else views.baseline_of(group)
        own, base = _training(group, "seconds"), _training(baseline, "seconds") if baseline else None
        return Entry(number(own.mean / base.mean) + " ×") if own and base and base.mean else NOTHING

    columns = {
        "seconds": lambda group: entry(_training(group, "seconds"), 1),
        "relative to the baseline": relative,
        "steps": lambda group: entry(_training(group, "steps"), 0),
        "samples/s": lambda group: entry(_training(group, "samples_per_second")),
    }
    table = summary_table(views.study, groups, columns)
    resumed = sum(bool((cell["training"] or {}).get("resumed")) for group in groups for cell in group.cells.values())
    note = "Wall time of training, evaluations on the validation text included, as the host reports it."
    if resumed:
        note += f" Runs that were interrupted are left out ({resumed}): only the time of their last piece is known."
    return Section("What training costs", note, tables=(table,)) if table else None


def _training(group: Group, key: str) -> Summary | None:
    trainings = [cell["training"] or {} for cell in group.cells.values()]
    return summarize(times.get(key) for times in trainings if key == "steps" or not times.get("resumed"))


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
    how = {"marker": look.marker if len(means) < 12 else "", "markersize": 4, "linewidth": 1.5}
    draw_band(axes, curve.steps, means, spread, look, alpha=0.13 if lines < 5 else 0.06, **how)


def _point_looks(groups: Sequence[Group]) -> dict[Group, Look]:
    """Color the points of one system from dark to light, in the matrix's order."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shades, last = colormaps["viridis"], max(1, len(groups) - 1)
    return {group: Look(to_hex(shades(0.88 * index / last)), "o", "-") for index, group in enumerate(groups)}


def _token_plot(views: Views, tokens: TokenClasses) -> Plot:
    """Draw difficulty and hard share of each group over the classes of tokens."""
    labels = {"difficulty": ("mean difficulty d (nats)", 1.0), "hard": ("hard tokens (%)", 100.0)}
    with canvas(panels=2, columns=2, height=3.4) as (figure, panels):
        for axes, (metric, (label, scale)) in zip(panels, labels.items(), strict=True):
            for group, by_metric in tokens.means.items():
                values = [scale * one.mean if one is not None else float("nan") for one in by_metric[metric]]
                look = views.looks[group.system]
                axes.plot(values, color=look.color, marker=look.marker, linestyle=look.line)
            axes.set_xticks(range(len(tokens.sizes)), [f"{size:,}" for size in tokens.sizes])
            axes.set(xlabel="different tokens in each fifth of the text", ylabel=label)
        names = short_names(list(tokens.means))
        name_below(figure, {name: views.looks[group.system] for group, name in names.items()})
        caption = "Difficulty and hard share over the training, from the most frequent to the rarest tokens."
        return finish(figure, "tokens", caption)
