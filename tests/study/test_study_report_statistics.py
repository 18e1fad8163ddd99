"""The report's statistics are those of sacrebleu and of a naive loop over resamples."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.study_results import DIRECTIONS, SEEDS, write_study
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from llamafactory_sekd.evaluation.scores import surface_metric
from llamafactory_sekd.evaluation.significance import PairedTests, corpus_statistics, holm
from llamafactory_sekd.evaluation.translation_store import read_hypotheses
from llamafactory_sekd.study.report.cells import Difference, Group, PairedBootstrap, Study, Texts, read_study
from llamafactory_sekd.study.report.translation_sections import (
    BUCKETS,
    by_difficulty,
    hard_sentences,
    judges,
    word_recall,
)
from llamafactory_sekd.study.report.views import Views, mark_of


COUNT = 40


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    return read_study(write_study(folder, COUNT), folder)


@pytest.fixture(scope="module")
def texts(study: Study) -> Texts:
    return Texts(study)


def group(study: Study, system: str, rate: float = 0.001) -> Group:
    (found,) = (one for one in study.groups if one.system == system and one.value("learning_rate") == rate)
    return found


def lines(study: Study, one: Group, seed: int | None, direction: str) -> list[str]:
    return read_hypotheses(study.root / one.cells[seed]["hypotheses"][direction], COUNT)


def naive(
    study: Study,
    texts: Texts,
    pair: tuple[Group, Group],
    directions: tuple[str, ...],
    metric: Callable[[], Any],
    samples: int,
) -> np.ndarray:
    """The difference on every resample: each seed's resampled lines are scored as a corpus, by sacrebleu itself."""
    rng = np.random.default_rng(12345)
    picks = rng.choice(COUNT, size=(samples, COUNT), replace=True)
    differences = []
    for pick in picks:
        scores = []
        for direction in directions:
            references = [texts.test_set(direction).references[index] for index in pick]
            for seed in SEEDS:
                one, other = (
                    metric().corpus_score([lines(study, side, seed, direction)[i] for i in pick], [references]).score
                    for side in pair
                )
                scores.append(one - other)
        differences.append(statistics.fmean(scores))
    return np.array(differences)


@pytest.mark.parametrize(("column", "metric"), [("en-de", "bleu"), ("average", "bleu"), ("average", "chrf")])
def test_the_bootstrap_over_seeds_is_that_of_a_naive_loop(
    study: Study, texts: Texts, column: str, metric: str
) -> None:
    pair = group(study, "Forward KD"), group(study, "SFT")
    samples = 25
    found = PairedBootstrap(texts, study.directions, samples).compare(*pair, column, metric)
    assert found is not None
    directions = DIRECTIONS if column == "average" else (column,)
    scorer = {"bleu": BLEU, "chrf": CHRF}[metric]
    expected = naive(study, texts, pair, directions, scorer, samples)

    observed = statistics.fmean(
        one["scores"][column][metric] - other["scores"][column][metric]
        for one, other in zip(pair[0].cells.values(), pair[1].cells.values(), strict=True)
    )
    assert found.value == pytest.approx(observed)
    assert found.low == pytest.approx(np.quantile(expected, 0.025))
    assert found.high == pytest.approx(np.quantile(expected, 0.975))
    beyond = sum(abs(value) - np.abs(expected).mean() > abs(observed) for value in expected)
    assert found.p == (beyond + 1) / (samples + 1)


def test_with_one_seed_p_is_sacrebleus_own(study: Study, texts: Texts) -> None:
    for system, rate in (("Forward KD", 0.001), ("Forward KD", 0.0005), ("Self-Evolution KD", 0.0005)):
        one, base = group(study, system, rate), group(study, "SFT", rate)
        pair = [Group(side.system, side.point, {2: side.cells[2]}) for side in (one, base)]
        found = PairedBootstrap(texts, study.directions).compare(*pair, "de-en", "bleu")
        assert found is not None
        references = texts.test_set("de-en").references
        metric, sides = surface_metric("bleu", "en"), {"base": base, "other": one}
        statistics = {
            name: [corpus_statistics(metric, lines(study, side, 2, "de-en"), references)]
            for name, side in sides.items()
        }
        expected = PairedTests("paired_bs", "base", statistics).direction(0)
        assert found.p == pytest.approx(expected["other"].p, abs=1e-12)


def test_seeds_are_paired_with_their_like_and_the_others_left_out(study: Study, texts: Texts) -> None:
    one, base = group(study, "Forward KD"), group(study, "SFT")
    fewer = Group(one.system, one.point, {seed: one.cells[seed] for seed in (3, 1)})
    found = PairedBootstrap(texts, study.directions, 10).compare(fewer, base, "average", "bleu")
    assert found is not None
    scores = [(one.cells[s]["scores"]["average"]["bleu"], base.cells[s]["scores"]["average"]["bleu"]) for s in (3, 1)]
    assert found.seeds == tuple(own - other for own, other in scores)

    stranger = Group(one.system, one.point, {9: one.cells[1]})
    assert PairedBootstrap(texts, study.directions, 10).compare(stranger, base, "average", "bleu") is None


def test_the_same_translations_differ_by_nothing_with_p_one(study: Study, texts: Texts) -> None:
    group = study.groups[0]
    difference = PairedBootstrap(texts, study.directions).compare(group, group, "average", "bleu")
    assert difference is not None
    assert (difference.value, difference.low, difference.high, difference.p) == (0.0, 0.0, 0.0, 1.0)


def test_a_model_without_seeds_is_the_partner_of_every_seed(study: Study, texts: Texts) -> None:
    (teacher,) = study.models
    found = PairedBootstrap(texts, study.directions, 10).compare(group(study, "SFT"), teacher, "en-de", "bleu")
    assert found is not None
    assert len(found.seeds) == len(SEEDS)
    assert found.value < 0


def test_comet_is_the_mean_of_paired_segment_differences(tmp_path: Path) -> None:
    results = write_study(tmp_path, COUNT)
    rng = np.random.default_rng(3)
    for cell in results["cells"]:
        scores = rng.uniform(0.5, 0.9, COUNT).tolist()
        path = tmp_path / "segment_scores" / f"{cell['id']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"scores": scores}))
        cell["segment_scores"] = dict.fromkeys(DIRECTIONS, str(path.relative_to(tmp_path)))
        for direction in DIRECTIONS:
            cell["scores"][direction]["comet"] = statistics.fmean(scores)
    study = read_study(results, tmp_path)
    texts = Texts(study)
    pair = group(study, "Forward KD"), group(study, "SFT")
    found = PairedBootstrap(texts, study.directions, 50).compare(*pair, "en-de", "comet")
    assert found is not None
    segments = np.mean(
        [
            texts.statistics(one, "en-de", "comet").rows[:, 0] - texts.statistics(other, "en-de", "comet").rows[:, 0]
            for one, other in zip(pair[0].cells.values(), pair[1].cells.values(), strict=True)
        ],
        axis=0,
    )
    picks = np.random.default_rng(12345).choice(COUNT, size=(50, COUNT), replace=True)
    assert found.value == pytest.approx(segments.mean())
    assert found.low == pytest.approx(np.quantile(segments[picks].mean(axis=1), 0.025))


@pytest.mark.parametrize(
    ("low", "corrected", "mark"), [(0.1, 0.01, "†"), (-0.1, 0.04, ""), (0.1, 0.06, ""), (0.1, None, "")]
)
def test_the_dagger_asks_for_both_the_corrected_p_and_the_interval(
    low: float, corrected: float | None, mark: str
) -> None:
    assert mark_of(Difference((0.5,), low, 2.0, 0.001, corrected), "bleu") == mark


def test_p_of_a_column_is_corrected_for_all_systems_that_it_compares(study: Study) -> None:
    views = Views(study)
    rows = (*study.models, *study.groups)
    found = {one: views.at_equal_settings(one, "average", "bleu") for one in rows}
    known = {one: difference for one, difference in found.items() if difference is not None}
    assert len(known) > 2
    expected = holm({one: difference.p for one, difference in known.items()})
    assert {one: difference.p_holm for one, difference in known.items()} == expected
    assert any(difference.p_holm != difference.p for difference in known.values())


@pytest.mark.parametrize(("value", "mark"), [(-0.5, "†"), (0.5, "▾")])
def test_fewer_errors_are_better(value: float, mark: str) -> None:
    ends = sorted((value / 2, value * 2))
    assert mark_of(Difference((value,), *ends, 0.001, 0.001), "ter") == mark


def test_hard_sentences_are_the_teachers_worse_half(study: Study, texts: Texts) -> None:
    (teacher,) = judges(study)
    assert teacher.system == "Teacher"
    references = texts.test_set("en-de").references
    hypotheses = lines(study, teacher, None, "en-de")
    scores = [CHRF().sentence_score(h, [r]).score for h, r in zip(hypotheses, references, strict=True)]
    ranked = sorted(range(COUNT), key=lambda index: scores[index])
    hard = hard_sentences(texts, (teacher,), "en-de")
    assert set(np.flatnonzero(hard)) == set(ranked[: COUNT // 2])

    one = group(study, "SFT")
    (halves,) = by_difficulty(study, texts, [one])
    seeds = []
    for seed in SEEDS:
        scores = []
        for direction in DIRECTIONS:
            chosen = np.flatnonzero(hard_sentences(texts, (teacher,), direction))
            own = [lines(study, one, seed, direction)[index] for index in chosen]
            scores.append(BLEU().corpus_score(own, [[texts.test_set(direction).references[i] for i in chosen]]).score)
        seeds.append(statistics.fmean(scores))
    assert halves.hard is not None
    assert halves.hard.mean == pytest.approx(statistics.fmean(seeds))
    assert halves.hard.sd == pytest.approx(statistics.stdev(seeds))


def test_without_a_teacher_all_systems_judge_and_never_the_baseline_alone(study: Study) -> None:
    alone = Study(study.results, study.root, study.keys, study.groups, (), ())
    assert judges(alone) == study.groups


def test_recall_of_words_by_frequency_is_that_of_a_plain_count(study: Study, texts: Texts) -> None:
    one = group(study, "SFT")
    recall = word_recall(study, texts, [one])
    records = json.loads((study.root / "data" / "train.json").read_text())
    low = list(BUCKETS.values())
    totals, hits = [0] * len(low), {seed: [0] * len(low) for seed in SEEDS}
    for direction, language in (("en-de", "to German"), ("de-en", "to English")):
        training = [w.strip(".") for r in records if language in r["instruction"] for w in r["output"].split()]
        for index, reference in enumerate(texts.test_set(direction).references):
            words = [word.strip(".") for word in reference.split()]
            for word in set(words):
                bucket = max(place for place, least in enumerate(low) if training.count(word) >= least)
                totals[bucket] += words.count(word)
                for seed in SEEDS:
                    own = [token.strip(".") for token in lines(study, one, seed, direction)[index].split()]
                    hits[seed][bucket] += min(words.count(word), own.count(word))
    assert list(recall.words) == totals
    assert sum(count > 0 for count in totals) > 1
    for bucket, total in enumerate(totals):
        found = recall.shares[0][bucket]
        if total == 0:
            assert found is None
        else:
            assert found is not None
            assert found.mean == pytest.approx(statistics.fmean(hits[seed][bucket] / total for seed in SEEDS))
