"""What the plots draw is what results.json says: the lines, bars and rings are read back from the figures."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.study_results import RATES, SEEDS, SYSTEMS, without_select, write_study

from llamafactory_sekd.reporting.figures import BASELINE
from llamafactory_sekd.study.report import score_plots, training_sections, translation_sections
from llamafactory_sekd.study.report.cells import read_study
from llamafactory_sekd.study.report.translation_sections import word_recall
from llamafactory_sekd.study.report.views import Views


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plots")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return write_study(folder)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures in place of their files."""
    figures: list[Any] = []

    def keep(figure: Any, name: str, caption: str) -> str:
        figures.append(figure)
        return name

    for module in (score_plots, training_sections, translation_sections):
        monkeypatch.setattr(module, "finish", keep)
    return figures


def lines(axes: Any, color: str) -> list[tuple[list[float], list[float]]]:
    """The x and y of the lines of one color."""
    return [(list(one.get_xdata()), list(one.get_ydata())) for one in axes.get_lines() if one.get_color() == color]


def mean_of(results: dict[str, Any], system: str, rate: float, value: Callable[[dict[str, Any]], float]) -> float:
    cells = [c for c in results["cells"] if c["system"] == system and c["axes"].get("learning_rate", rate) == rate]
    assert len(cells) == len(SEEDS)
    return statistics.fmean(map(value, cells))


def test_scores_over_a_key_are_the_means_and_what_has_no_number_is_level(
    results: dict[str, Any], folder: Path, drawn: list[Any]
) -> None:
    changed = copy.deepcopy(without_select(results))
    changed["cells"] = [
        c for c in changed["cells"] if c["system"] != "Forward KD" or c["axes"]["learning_rate"] == RATES[0]
    ]
    for cell in changed["cells"]:
        if cell["system"] == "Forward KD":
            cell["axes"] = {}  # the key says nothing to it
    views = Views(read_study(changed, folder))
    assert score_plots.over_key(views, "learning_rate") == "over_learning_rate"
    for axes, metric in zip(drawn[0].axes, ("bleu", "chrf"), strict=True):

        def average(cell: dict[str, Any], metric: str = metric) -> float:
            return cell["scores"]["average"][metric]

        for system in ("SFT", "Self-Evolution KD"):
            ((xs, ys),) = lines(axes, views.looks[system].color)
            assert tuple(xs) == RATES
            assert ys == pytest.approx([mean_of(results, system, rate, average) for rate in RATES])
        ((_, level),) = lines(axes, views.looks["Forward KD"].color)
        assert level == pytest.approx([mean_of(changed, "Forward KD", RATES[0], average)] * 2)
    (legend,) = drawn[0].legends
    assert {text.get_text() for text in legend.get_texts()} == set(SYSTEMS)


def test_the_rings_are_at_the_best_values(results: dict[str, Any], folder: Path, drawn: list[Any]) -> None:
    views = Views(read_study(results, folder))
    assert score_plots.selection_plot(views) is not None
    for row in results["selection"]:
        curve, ring = lines(drawn[0].axes[0], views.looks[row["system"]].color)
        assert curve == (list(RATES), [one["mean"] for one in row["by_value"]])
        assert ring == ([row["value"]], [min(curve[1])])


def test_bars_are_means_with_a_dot_for_each_seed(results: dict[str, Any], folder: Path, drawn: list[Any]) -> None:
    views = Views(read_study(results, folder))
    assert score_plots.similarity_plot(views) == "similarity"
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(SYSTEMS)
    for bar, choice in zip(axes.patches, views.chosen, strict=True):
        expected = mean_of(results, choice.group.system, choice.value, lambda cell: cell["similarity"]["average"])
        assert bar.get_width() == pytest.approx(expected)
    assert axes.get_xlim()[0] == 0


def test_differences_are_drawn_with_their_intervals_and_seeds(
    results: dict[str, Any], folder: Path, drawn: list[Any]
) -> None:
    views = Views(read_study(results, folder))
    assert score_plots.differences_plot(views, views.groups, views.at_own_best) == "differences"
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Forward KD", "Self-Evolution KD"]
    for place, group in enumerate(views.groups[1:]):
        expected = views.at_own_best(group, "average", "bleu")
        assert expected is not None
        interval, seeds, point = lines(axes, views.looks[group.system].color)
        assert interval == ([expected.low, expected.high], [place, place])
        assert seeds[0] == list(expected.seeds)
        assert point == ([expected.value], [place])


def test_learning_curves_are_logged_values_and_differences_to_the_baseline(
    results: dict[str, Any], folder: Path, drawn: list[Any]
) -> None:
    views = Views(read_study(results, folder))
    names = {group: group.system for group in views.groups}
    looks = {group: views.looks[group.system] for group in views.groups}
    baselines = {group: views.baseline_of(group) for group in views.groups}
    runs = training_sections.Runs(names, baselines, looks, training_sections.Histories(views.study.root))
    assert training_sections.learning_plot("", runs) == "learning"
    panels = {axes.get_title(loc="left"): axes for axes in drawn[0].axes}
    color = views.looks["Forward KD"].color
    steps, nll = lines(panels["NLL, validation"], color)[0]
    _, base = lines(panels["NLL, validation"], BASELINE)[0]
    assert steps == [100, 200, 300]
    assert lines(panels["NLL, validation, to the baseline"], color)[0][1] == pytest.approx(
        [own - other for own, other in zip(nll, base, strict=True)]
    )
    assert nll[-1] == pytest.approx(mean_of(results, "Forward KD", 0.0005, lambda cell: cell["validation"]["nll"]))
    assert not lines(panels["agreement (%), training"], BASELINE), "the host's SFT logs no agreement"
    assert training_sections.gate_plot("", runs) == "gate"
    hard = next(axes for axes in drawn[1].axes if axes.get_title(loc="left") == "hard tokens (%)")
    assert len(hard.get_lines()) == 2, "the host's SFT has no difficulty"
    assert lines(hard, views.looks["Self-Evolution KD"].color)[0][1][-1] == pytest.approx(30)


def test_word_recall_is_drawn_against_the_baseline(results: dict[str, Any], folder: Path, drawn: list[Any]) -> None:
    views = Views(read_study(results, folder))
    recall = word_recall(views.study, views.texts, views.groups)
    shares = dict(zip(views.groups, recall.shares, strict=True))
    baselines = {group: views.baseline_of(group) for group in views.groups}
    assert translation_sections.frequency_plot(baselines, recall.words, shares, views.looks) == "frequency"
    sft, _, evolved = views.groups
    expected = [
        100 * (own.mean - base.mean) for own, base in zip(shares[evolved], shares[sft], strict=True) if own and base
    ]
    assert lines(drawn[0].axes[0], views.looks[evolved.system].color)[0][1] == pytest.approx(expected)
    assert translation_sections.frequency_plot(dict.fromkeys(baselines), recall.words, shares, views.looks) is None


def test_every_system_looks_different_and_the_same_in_every_plot(results: dict[str, Any], folder: Path) -> None:
    many = copy.deepcopy(results)
    many["spec"]["systems"] = {f"system {number}": {} for number in range(20)} | {"SFT": {}}
    given = Views(read_study(many, folder)).looks
    assert len({(look.color, look.line) for look in given.values()}) == len(given)
    assert given["SFT"].color == BASELINE
