"""Scores of parts of a test set are those of the parts alone; what people notice is what the paper has printed."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from helpers.sentences import ENGLISH, GERMAN, write_lines
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from llamafactory_sekd.evaluation.evaluation_report import build_document
from llamafactory_sekd.evaluation.evaluation_results import Evaluated, build_results
from llamafactory_sekd.evaluation.evaluation_run import collect_hypotheses, prepare
from llamafactory_sekd.evaluation.evaluation_settings import Settings, parse_settings
from llamafactory_sekd.evaluation.guards import REST, by_part
from llamafactory_sekd.evaluation.significance import MODEL_RELATIONS, RELATIONS, noticed, segment_statistics, share
from llamafactory_sekd.host.evaluate import build_host
from llamafactory_sekd.ranks import Ranks
from llamafactory_sekd.reporting.document import render_html


SECOND = [line.replace("ist", "sind").replace("wurde", "ward") for line in GERMAN]
METRICS = {"bleu": BLEU, "chrf": CHRF, "ter": TER}
DOCUMENTS = ["a", "a", "a", "b", "b", "b", "b", "", "c", "c"]


@pytest.fixture
def data(config: dict[str, Any], tmp_path: Path) -> Evaluated:
    folder = tmp_path / "news"
    write_lines(folder / "en-de.en", ENGLISH)
    write_lines(folder / "en-de.de", GERMAN)
    write_lines(folder / "en-de.de.2", SECOND)
    write_lines(folder / "en-de.docid", DOCUMENTS)
    write_lines(folder / "en-de.domain", ["news"] * 4 + ["chat"] * 6)
    systems = {"one": [line.replace("die", "eine") for line in GERMAN], "two": [*GERMAN[:7], *GERMAN[:3]]}
    for name, lines in systems.items():
        write_lines(tmp_path / name / "en-de.txt", lines)
    config |= {"task": "news", "task_dir": str(tmp_path), "directions": ["en-de"], "teacher": None}
    config |= {"metrics": list(METRICS), "systems": {name: {"hypotheses": str(tmp_path / name)} for name in systems}}
    settings = parse_settings(config, "eval.yaml")
    host = build_host(settings)
    found = prepare(settings, host)
    hypotheses = collect_hypotheses(settings, found.test_sets, host, Ranks())
    return Evaluated(settings, found.test_sets, hypotheses, {}, {})


def of_lines(data: Evaluated, name: str, metric: str, places: list[int]) -> float:
    (done,) = data.hypotheses[name].values()
    references = [[texts[place] for place in places] for texts in (GERMAN, SECOND)]
    return METRICS[metric]().corpus_score([done.lines[place] for place in places], references).score


def test_a_part_has_sacrebleus_score_of_its_sentences(data: Evaluated) -> None:
    results = build_results(data)
    words = [len(line.split()) for line in ENGLISH]
    expected = {
        "by_domain": {"news": list(range(4)), "chat": list(range(4, 10))},
        "by_length": {
            "1–10 words": [place for place, count in enumerate(words) if count <= 10],
            "11–20": [place for place, count in enumerate(words) if 10 < count <= 20],
            "21–30": [place for place, count in enumerate(words) if 20 < count <= 30],
        },
    }
    for key, parts in expected.items():
        found = results[key]["en-de"]
        assert {part: one["sentences"] for part, one in found.items()} == {
            part: len(places) for part, places in parts.items()
        }
        for part, places in parts.items():
            for name in data.hypotheses:
                for metric in METRICS:
                    assert found[part]["scores"][name][metric] == pytest.approx(of_lines(data, name, metric, places))


def test_documents_have_the_mean_and_spread_of_their_own_scores(data: Evaluated) -> None:
    found = build_results(data)["by_document"]["en-de"]
    assert found["documents"] == 3  # the sentence without a name is in none
    documents = [[0, 1, 2], [3, 4, 5, 6], [8, 9]]
    for name in data.hypotheses:
        for metric in METRICS:
            scores = [of_lines(data, name, metric, places) for places in documents]
            assert found["scores"][name][metric]["mean"] == pytest.approx(statistics.fmean(scores))
            assert found["scores"][name][metric]["sd"] == pytest.approx(statistics.stdev(scores))


def test_a_models_score_of_a_part_is_the_mean_of_its_sentences(data: Evaluated) -> None:
    scores = [0.1 * place for place in range(10)]
    found = by_part(data.test_sets, {"comet": {"one": [segment_statistics(scores)]}})
    assert found["by_domain"]["en-de"]["news"]["scores"]["one"]["comet"] == pytest.approx(statistics.fmean(scores[:4]))
    all_of_it = segment_statistics(scores)
    assert all_of_it.score(all_of_it.rows.sum(0)) == pytest.approx(statistics.fmean(scores))


def test_text_without_spaces_has_two_characters_to_a_word(config: dict[str, Any], tmp_path: Path) -> None:
    write_lines(tmp_path / "t" / "zh-en.zh", ["字" * 20, "字" * 21, "字" * 101])
    write_lines(tmp_path / "t" / "zh-en.en", ["a", "b", "c"])
    write_lines(tmp_path / "s" / "zh-en.txt", ["a", "b", "c"])
    keys = {"task": "t", "task_dir": str(tmp_path), "directions": ["zh-en"], "metrics": ["chrf"]}
    systems = {"s": {"hypotheses": str(tmp_path / "s")}}
    settings = parse_settings({**keys, "systems": systems, "save_dir": str(tmp_path / "out")}, "eval.yaml")
    host = build_host(settings)
    test_sets = prepare(settings, host).test_sets
    hypotheses = collect_hypotheses(settings, test_sets, host, Ranks())
    results = build_results(Evaluated(settings, test_sets, hypotheses, {}, {}))
    assert {band: one["sentences"] for band, one in results["by_length"]["zh-en"].items()} == {
        "1–10 words": 1,
        "11–20": 1,
        REST: 1,
    }


def test_the_report_shows_parts_and_what_people_notice(data: Evaluated) -> None:
    page = render_html(build_document(data, build_results(data)))
    for text in ("BLEU by domain, en-de", "BLEU by length, en-de", "By document, en-de (3 documents)", "chat (6)"):
        assert text in page
    assert "Noticed by people" in page


# Table 2 of the paper, and the table of its repository that has the models published later: the difference from which
# 50, 55, … 95 % are reached.
PRINTED = {
    "bleu": (0.27, 0.52, 0.78, 1.06, 1.39, 1.79, 2.34, 3.35),
    "chrf": (0.14, 0.33, 0.54, 0.76, 1.00, 1.28, 1.63, 2.12, 3.05),
    "spbleu": (0.25, 0.52, 0.82, 1.13, 1.49, 1.91, 2.46, 3.28, 5.57),
    "wmt20-comet-da": (0.08, 0.36, 0.65, 0.96, 1.29, 1.67, 2.10, 2.66, 3.45, 5.10),
    "wmt22-comet-da": (0.03, 0.10, 0.18, 0.26, 0.35, 0.45, 0.56, 0.71, 0.94, 1.53),
    "wmt22-cometkiwi-da": (0.01, 0.08, 0.16, 0.24, 0.33, 0.42, 0.53, 0.67, 0.85, 1.18),
    "wmt23-cometkiwi-da-xxl": (0.06, 0.22, 0.39, 0.57, 0.77, 0.98, 1.24, 1.58, 2.08, 3.39),
    "XCOMET-XL": (0.05, 0.19, 0.34, 0.50, 0.67, 0.86, 1.08, 1.37, 1.80, 2.82),
    "XCOMET-XXL": (0.02, 0.19, 0.37, 0.56, 0.76, 0.98, 1.24, 1.55, 1.99, 2.74),
}


@pytest.mark.parametrize("metric", sorted(PRINTED))
def test_the_relation_to_peoples_verdict_gives_the_papers_table(metric: str) -> None:
    relation = {**RELATIONS, **MODEL_RELATIONS}[metric]
    for accuracy, printed in zip(range(50, 100, 5), PRINTED[metric], strict=False):
        difference = -math.log(relation[0] / accuracy - 1) / relation[1]
        assert abs(difference - printed) <= 0.0051
        assert share(relation, -difference) == pytest.approx(accuracy / 100)
    assert {**RELATIONS, **MODEL_RELATIONS}.keys() == PRINTED.keys()


def settings_of(tmp_path: Path, **keys: Any) -> Settings:
    systems = {"one": {"hypotheses": str(tmp_path)}, "two": {"hypotheses": str(tmp_path)}}
    given = {"task": "t", "directions": ["en-de"], "systems": systems, "baseline": "one", "save_dir": str(tmp_path)}
    return parse_settings({**given, **keys}, "eval.yaml")


def test_only_the_metrics_that_people_were_asked_about_have_a_share(tmp_path: Path) -> None:
    metrics = ["bleu", "ter", "comet"]
    scores = {"one": {"bleu": 20.0, "ter": 60.0, "comet": 0.80}, "two": {"bleu": 21.0, "ter": 50.0, "comet": 0.81}}
    systems = {name: {"scores": {"en-de": entry}} for name, entry in scores.items()}
    found = noticed(systems, settings_of(tmp_path, metrics=metrics))
    shares = {"bleu": pytest.approx(0.63989, abs=1e-4), "comet": pytest.approx(0.9092, abs=1e-3)}
    assert found == {"two": {"en-de": shares}}
    other = noticed(systems, settings_of(tmp_path, metrics=metrics, comet="my/model", bleu_tokenizer="intl"))
    assert other == {}
    assert noticed(systems, settings_of(tmp_path, metrics=metrics, baseline=None)) == {}
