"""What the sections share: which groups stand for the systems, their baselines, their looks, their texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rich.console import Console
from rich.progress import track

from llamafactory_sekd.errors import SekdError
from llamafactory_sekd.evaluation.significance import holm
from llamafactory_sekd.reporting.figures import BASELINE, SOFT, Look, distinct_looks
from llamafactory_sekd.study.report.best_values import Choice, choices, chosen_baseline
from llamafactory_sekd.study.report.cells import Group, Study
from llamafactory_sekd.study.report.history import Histories
from llamafactory_sekd.study.report.paired import Difference, PairedBootstrap
from llamafactory_sekd.study.report.sentence_texts import Texts
from llamafactory_sekd.study.report.tables import shown_metrics


@dataclass(frozen=True)
class Views:
    """A study as its report looks at it."""

    study: Study

    @cached_property
    def chosen(self) -> tuple[Choice, ...]:
        """Return each system at its own best value, where one was selected."""
        return choices(self.study)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups that stand for the systems: each at its own best value, or all where nothing is selected."""
        return tuple(choice.group for choice in self.chosen) or self.study.groups

    def baseline_of(self, group: Group) -> Group | None:
        """Return the baseline of one of :attr:`groups`, itself at its own best value."""
        return chosen_baseline(self.study, self.chosen, group) if self.chosen else self.study.baseline_of(group)

    def keys_of(self, groups: Sequence[Group]) -> tuple[str, ...]:
        """Return the keys of the matrix in which any of the groups differs."""
        return tuple(key for key in self.study.keys if any(key in dict(group.point) for group in groups))

    @property
    def remaining_keys(self) -> tuple[str, ...]:
        """The keys of the matrix that no selection has settled."""
        return tuple(key for key in self.study.keys if not self.chosen or key != self.chosen[0].key)

    @cached_property
    def looks(self) -> dict[str, Look]:
        """Return color, marker and line of each system."""
        return _looks(self.study)

    @cached_property
    def texts(self) -> Texts:
        """Return the translations and references."""
        return Texts(self.study)

    @cached_property
    def unreadable(self) -> str | None:
        """Why the translations or the test set cannot be read, None where all can.

        This takes the statistics of all sentences, the long part of a report, and shows how far it is.
        """
        cells = [cell for group in (*self.study.groups, *self.study.models) for cell in group.cells.values()]
        work = [(cell, direction) for cell in cells for direction in self.study.directions]
        try:
            console = Console(stderr=True)
            quiet = not console.is_terminal
            for cell, direction in track(work, "Report", console=console, transient=True, disable=quiet):
                for metric in {"bleu", *shown_metrics(self.study)}:
                    if cell["scores"][direction].get(metric) is not None:
                        self.texts.statistics(cell, direction, metric)
        except SekdError as error:
            return str(error)
        return None

    @cached_property
    def histories(self) -> Histories:
        """Return the logs of the trainings."""
        return Histories(self.study.root)

    @cached_property
    def _bootstrap(self) -> PairedBootstrap:
        return PairedBootstrap(self.texts, self.study.directions)

    def at_own_best(self, group: Group, column: str, metric: str) -> Difference | None:
        """Compare a group with its baseline, both at their own best value where one was selected."""
        baselines = {one: self.baseline_of(one) for one in (*self.study.models, *self.groups)}
        return self._corrected("own best", baselines, column, metric).get(group)

    def at_equal_settings(self, group: Group, column: str, metric: str) -> Difference | None:
        """Compare a group with the baseline at the same point of the matrix."""
        baselines = {one: self.study.baseline_of(one) for one in (*self.study.models, *self.study.groups)}
        return self._corrected("equal settings", baselines, column, metric).get(group)

    def _corrected(
        self, table: str, baselines: Mapping[Group, Group | None], column: str, metric: str
    ) -> dict[Group, Difference]:
        """Return the differences of a column of a ``table``, with p corrected for the number of its comparisons."""
        key = (table, column, metric)
        if key not in self._columns:
            compared = {group: self.between(group, other, column, metric) for group, other in baselines.items()}
            found = {group: one for group, one in compared.items() if one is not None}
            corrected = holm({group: one.p for group, one in found.items()})
            self._columns[key] = {group: replace(one, p_holm=corrected[group]) for group, one in found.items()}
        return self._columns[key]

    @cached_property
    def _columns(self) -> dict[tuple[str, str, str], dict[Group, Difference]]:
        return {}

    def between(self, group: Group, other: Group | None, column: str, metric: str) -> Difference | None:
        """Compare any two groups; None where there is no other one, or the texts cannot be read."""
        if other is None or self.unreadable is not None:
            return None
        return self._bootstrap.compare(group, other, column, metric)


def _looks(study: Study) -> dict[str, Look]:
    """Give each system its look: the baseline black, the others colors in the study's order."""
    given = distinct_looks()
    found: dict[str, Look] = {}
    for system in dict.fromkeys([*study.spec["systems"], *study.systems]):
        if system == study.baseline:
            found[system] = Look(BASELINE, "o", "-")
        elif system == study.teacher:
            found[system] = Look(SOFT, "", ":")
        else:
            found[system] = next(given)
    return found
