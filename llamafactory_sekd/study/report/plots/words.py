"""Recall of words by their frequency in training, as differences to the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llamafactory_sekd.reporting.document import Plot
from llamafactory_sekd.reporting.figures import BASELINE, Look, canvas, finish, name_below
from llamafactory_sekd.study.report.cells import Group, Summary
from llamafactory_sekd.study.report.frequency import BUCKETS


def frequency_plot(
    baselines: Mapping[Group, Group | None],
    words: Sequence[int],
    shares: Mapping[Group, Sequence[Summary | None]],
    looks: Mapping[str, Look],
) -> Plot | None:
    """Draw the recall of each group minus its baseline's, in points; None where no group has a baseline.

    Args:
        baselines: the groups to draw, one per system, and each one's baseline.
        words: how many words of the references each bucket has.
        shares: of all groups and baselines, as in :class:`~llamafactory_sekd.study.report.frequency.Recall`.
        looks: by system.
    """
    present = [bucket for bucket, count in enumerate(words) if count]
    with canvas(height=3.6) as (figure, (axes,)):
        drawn: dict[str, Look] = {}
        for group, baseline in baselines.items():
            if baseline is None:
                continue
            gains = [
                100 * (own.mean - base.mean)
                for bucket in present
                if (own := shares[group][bucket]) is not None and (base := shares[baseline][bucket]) is not None
            ]
            look = looks[group.system]
            axes.plot(gains, color=look.color, marker=look.marker, linestyle=look.line)
            drawn[group.system] = look
        if not drawn:
            return None
        axes.axhline(0, color=BASELINE, linewidth=1.2)
        axes.set_xticks(range(len(present)), [f"{list(BUCKETS)[one]}\n({words[one]:,})" for one in present])
        axes.set(
            xlabel="occurrences in the training text (words of the references)", ylabel="recall, difference in points"
        )
        name_below(figure, {**drawn, "the baseline": Look(BASELINE, "", "-")})
        caption = "Recall of the references' words by their frequency in the training text, against the baseline."
        return finish(figure, "frequency", caption)
