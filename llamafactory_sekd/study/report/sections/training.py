"""Training: what the gate does, how the systems learn, where they end, what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from llamafactory_sekd.arguments import TOKEN_TABLE
from llamafactory_sekd.reporting.document import NOTHING, Column, Entry, Plot, Section, Table
from llamafactory_sekd.reporting.metric_labels import number
from llamafactory_sekd.study.report.cells import Group, Summary, short_names, summarize
from llamafactory_sekd.study.report.plots.learning_curves import Runs, gate_plot, learning_plot, point_looks
from llamafactory_sekd.study.report.plots.token_frequency import token_plot
from llamafactory_sekd.study.report.tables import entry, heads_of, rows_of, summary_table
from llamafactory_sekd.study.report.token_tables import CLASSES, token_classes
from llamafactory_sekd.study.report.views import Views


# So many lines can still be told apart in one plot.
MOST_LINES = 9
# Heading -> (metric of the last evaluation on the validation text, digits, factor)
LAST_METRICS = {
    "NLL": ("nll", 4, 1.0),
    "agreement (%)": ("eval_kd/agreement", 2, 100.0),
    "KL(p ‖ q)": ("eval_kd/teacher_kl", 4, 1.0),
    "difficulty d": ("eval_kd/difficulty", 4, 1.0),
    "hard tokens (%)": ("eval_kd/hard_ratio", 2, 100.0),
    "loss": ("eval_loss", 4, 1.0),
}


def sections(views: Views) -> Iterator[Section | None]:
    """Yield the sections about training."""
    groups = [group for group in views.groups if group.trained]
    if not groups:
        return
    yield _gate(views, groups)
    yield _tokens(views, groups)
    yield _learning(views, groups)
    yield _cost(views, groups)


def _drawn(views: Views, groups: Sequence[Group], draw: Callable[[str, Runs], Plot | None]) -> tuple[Plot, ...]:
    """Draw all groups in one plot, or one plot per system where they are too many or a system has several."""
    baselines = {group: views.baseline_of(group) for group in groups}
    by_system = {system: [group for group in groups if group.system == system] for system in views.study.systems}
    looks = {group: views.looks[group.system] for group in groups}
    if len(groups) <= MOST_LINES and all(len(own) <= 1 for own in by_system.values()):
        plots = [draw("", Runs(short_names(groups), baselines, looks, views.histories))]
    else:
        plots = []
        # A baseline on which the matrix has no effect appears in every system's plot.
        own_baseline = by_system.get(views.study.baseline or "", [])
        reference = own_baseline if len(own_baseline) == 1 else []
        for index, (system, own) in enumerate(by_system.items(), start=1):
            if own and own != reference:
                names = {**short_names(own), **{group: group.system for group in reference}}
                own_looks = {**point_looks(own), **{group: looks[group] for group in reference}}
                plots.append(draw(f"_{index}", Runs(names, baselines, own_looks, views.histories, title=system)))
    return tuple(plot for plot in plots if plot is not None)


def _gate(views: Views, groups: Sequence[Group]) -> Section | None:
    plots = _drawn(views, groups, gate_plot)
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
    keys = views.keys_of(list(means))
    columns = tuple(Column(f"{size:,}", head) for head in ("difficulty d", "hard tokens (%)") for size in found.sizes)
    rows = rows_of(
        views.study,
        list(means),
        keys,
        lambda group: [
            *(entry(one) for one in means[group]["difficulty"]),
            *(entry(one, 1, 100.0) for one in means[group]["hard"]),
        ],
    )
    note = (
        f"Means over the entire training. The response tokens are divided into {CLASSES} parts of about equal mass by "
        "how frequent their entry of the vocabulary is among them, the most frequent first; a column is named by how "
        f"many different entries its part has. Single tokens are in each run's `{TOKEN_TABLE}`."
    )
    plots: tuple[Plot, ...] = ()
    if len(means) <= MOST_LINES and len({group.system for group in means}) == len(means):
        looks = {group: views.looks[group.system] for group in means}
        plots = (token_plot(found.sizes, means, short_names(list(means)), looks),)
    return Section(
        "Rare and frequent tokens in training", note, tables=(Table(heads_of(keys), columns, rows),), plots=plots
    )


def _learning(views: Views, groups: Sequence[Group]) -> Section | None:
    columns = {
        name: (lambda group, of=of: entry(validation(group, of[0]), of[1], of[2])) for name, of in LAST_METRICS.items()
    }
    # Without an evaluation, it is the study's main table already.
    table = summary_table(views.study, groups, views.keys_of(groups), columns) if views.study.directions else None
    plots = _drawn(views, groups, learning_plot)
    if table is None and not plots:
        return None
    note = (
        "The table holds the last evaluation of each run on the validation text. NLL and agreement (how often student "
        "and teacher have the same most likely token) can be compared between systems; losses of different objectives "
        "cannot."
    )
    return Section("Learning curves", note, tables=(table,) if table else (), plots=plots)


def validation(group: Group, metric: str) -> Summary | None:
    """Summarize a validation metric over the seeds."""
    return summarize((cell["validation"] or {}).get(metric) for cell in group.cells.values())


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
    table = summary_table(views.study, groups, views.keys_of(groups), columns)
    resumed = sum(bool((cell["training"] or {}).get("resumed")) for group in groups for cell in group.cells.values())
    note = "Wall time of training, evaluations on the validation text included, as the host reports it."
    if resumed:
        note += f" Runs that were interrupted are left out ({resumed}): only the time of their last piece is known."
    return Section("What training costs", note, tables=(table,)) if table else None


def _training(group: Group, key: str) -> Summary | None:
    trainings = [cell["training"] or {} for cell in group.cells.values()]
    return summarize(times.get(key) for times in trainings if key == "steps" or not times.get("resumed"))
