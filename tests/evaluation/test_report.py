"""The report shows what results.json says, and translations cannot act in it."""

from __future__ import annotations

import dataclasses
import html
import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.latex_tables import faults_of
from helpers.sentences import ENGLISH, GERMAN, write_lines
from rich.console import Console

from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.evaluation.evaluation_report import EXAMPLES, build_document, differing, most_different
from llamafactory_sekd.evaluation.evaluation_results import Evaluated, build_results
from llamafactory_sekd.evaluation.evaluation_settings import parse_settings
from llamafactory_sekd.evaluation.translation_store import Hypotheses
from llamafactory_sekd.reporting.document import (
    Document,
    Entry,
    Section,
    escape_markdown,
    render_html,
    render_latex,
    render_markdown,
)
from llamafactory_sekd.reporting.metric_labels import significance_mark
from llamafactory_sekd.reporting.terminal import print_document


SCRIPT = '<script>document.title = "hacked"</script><img src=x onerror=\'document.title="hacked"\'>'
SYSTEMS = {
    "student": [SCRIPT, *GERMAN[1:5], "", *["| **fett** `code` | " + line for line in GERMAN[6:]]],
    "forward_kl": [line.replace("die", "diese") for line in GERMAN],
    "teacher": GERMAN[:8] + ENGLISH[8:],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("report")
    for name in ("en-de", "de-en"):
        write_lines(folder / f"{name}.en", ENGLISH)
        write_lines(folder / f"{name}.de", GERMAN)
    config = {
        "task": "wmt22",
        "directions": ["en-de", "de-en"],
        "systems": {name: {"hypotheses": "elsewhere"} for name in SYSTEMS},
        "baseline": "forward_kl",
        "teacher": "teacher",
        "save_dir": str(folder / "results"),
    }
    settings = parse_settings(config, "eval.yaml")
    directions = [parse_direction(text) for text in ("en-de", "de-en")]
    test_sets = {direction: load_test_set("wmt22", folder, str(direction)) for direction in directions}
    hypotheses = {
        name: {
            directions[0]: Hypotheses(lines, "f", [False] * 9 + [True], seconds=2.0, ranks=2),
            directions[1]: Hypotheses(ENGLISH, "f"),
        }
        for name, lines in SYSTEMS.items()
    }
    return Evaluated(settings, test_sets, hypotheses, {}, {"comet": "not to be had"})


@pytest.fixture(scope="module")
def results(data: Evaluated) -> dict[str, Any]:
    return build_results(data)


@pytest.fixture(scope="module")
def view(data: Evaluated, results: dict[str, Any]) -> Document:
    return build_document(data, results)


def section(document: Document, title: str) -> Section:
    return next(one for one in document.sections if one.title == title)


def bleu(document: Document, direction: str) -> dict[str, Entry]:
    (table,) = section(document, "Scores").tables
    (place,) = (i for i, one in enumerate(table.columns) if (one.name, one.group) == ("BLEU", direction))
    return {row.names[0]: row.entries[place] for row in table.rows}


def test_results_have_the_documented_contents(results: dict[str, Any]) -> None:
    student = results["systems"]["student"]
    assert set(student["scores"]) == {"en-de", "de-en", "average"}
    scores = student["scores"]["en-de"]
    assert scores["comet"] is None
    assert 0 < scores["bleu"] < 100
    assert student["scores"]["average"]["bleu"] == pytest.approx((scores["bleu"] + 100) / 2)
    assert student["scores"]["average"]["comet"] is None
    assert set(student["similarity"]) == {"en-de", "de-en", "average"}
    assert results["systems"]["teacher"]["similarity"] is None
    assert student["guards"]["en-de"]["empty"] == 0.1
    assert student["guards"]["en-de"]["hit_max_new_tokens"] == 0.1
    assert student["guards"]["de-en"]["hit_max_new_tokens"] is None
    assert student["generation"] == {"en-de": {"seconds": 1.0, "sentences_per_second": 10.0}}
    paired = results["significance"]["student"]["en-de"]["bleu"]
    assert set(paired) == {"p", "p_holm", "mean", "ci", "low", "high"}
    assert results["significance"]["forward_kl"]["en-de"]["bleu"]["p"] is None
    assert results["signatures"]["en-de"]["bleu"].startswith("nrefs:1|case:mixed")
    assert results["fingerprints"]["student"] == {"en-de": "f", "de-en": "f"}
    assert {"sacrebleu", "torch", "llamafactory_sekd"} <= set(results["versions"])
    assert results["skipped"] == {"comet": "not to be had"}


def test_a_difference_of_nothing_has_no_dagger(view: Document) -> None:
    cell = bleu(view, "de-en")["student"]
    assert (cell.small + cell.mark, cell.best) == ("+0.0", True)


def test_the_teacher_takes_no_part_in_the_best(view: Document) -> None:
    best = {name: entry.best for name, entry in bleu(view, "en-de").items()}
    assert best == {"student": False, "forward_kl": True, "teacher": False}


def test_all_forms_show_the_same_scores(
    view: Document, results: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    print_document(view)
    terminal = capsys.readouterr().out
    page, markdown = render_html(view), render_markdown(view)
    for name in SYSTEMS:
        value = f"{results['systems'][name]['scores']['en-de']['bleu']:.1f}"
        assert all(value in text for text in (page, markdown, terminal))
        assert name in page
        assert name in terminal
        assert escape_markdown(name) in markdown
    for text in (page, markdown, terminal):
        assert "not to be had" in text
    assert results["signatures"]["en-de"]["bleu"] in markdown
    assert html.escape(results["signatures"]["en-de"]["bleu"]) in page


def test_the_page_is_self_contained(view: Document) -> None:
    assert not re.search(r"<(script|link|img|iframe)|<[^>]*\s(src|href)=|url\(|@import", render_html(view))


def test_translations_are_escaped(view: Document) -> None:
    page, markdown = render_html(view), render_markdown(view)
    assert SCRIPT in SYSTEMS["student"]
    for text in (page, markdown):
        assert "hacked" in text
        assert "<script" not in text
        assert "<img" not in text
    assert r"\| \*\*fett\*\* \`code\` \|" in markdown


def test_every_score_table_names_its_metric_and_shows_intervals(view: Document, results: dict[str, Any]) -> None:
    page, markdown, tex = render_html(view), render_markdown(view), render_latex(view)
    half = results["significance"]["student"]["en-de"]["bleu"]["ci"]
    for text in (page, markdown):
        assert f"± {half:.1f}" in text
    assert rf"$\pm$ {half:.1f}" in tex
    assert faults_of(tex) == []
    assert all(
        column.name in ("BLEU", "chrF2") for table in section(view, "Scores").tables for column in table.columns
    )
    assert ">BLEU</th>" in page
    assert "| en-de BLEU |" in markdown


@pytest.mark.parametrize(
    ("metric", "difference", "significant", "mark"),
    [
        ("bleu", 0.5, True, "†"),
        ("bleu", -0.5, True, "▾"),
        ("ter", -0.5, True, "†"),
        ("bleu", 0.5, False, ""),
        ("bleu", 0.04, True, ""),  # shown as +0.0
        ("comet", 0.004, True, "†"),  # shown as +0.4
        ("comet", 0.0004, True, ""),
    ],
)
def test_a_dagger_means_better_and_nothing_marks_what_rounds_to_zero(
    metric: str, difference: float, significant: bool, mark: str
) -> None:
    assert significance_mark(metric, difference, significant, 1) == mark


def test_a_pipe_gets_uncut_lines_with_roles_in_brackets(view: Document) -> None:
    console = Console(file=io.StringIO(), width=20)
    print_document(view, console)
    text = console.file.getvalue()
    assert "forward_kl (baseline)" in text
    assert "teacher (teacher)" in text
    assert "…" not in text
    assert "\x1b" not in text


def test_one_system_alone_shows_its_translations_and_no_sentence_twice(data: Evaluated) -> None:
    (direction, *_) = data.test_sets
    test_set = data.test_sets[direction]
    twice = dataclasses.replace(test_set, sources=test_set.sources * 2, references=test_set.references * 2)
    lines = SYSTEMS["student"] * 2
    alone = dataclasses.replace(
        data, test_sets={direction: twice}, hypotheses={"student": {direction: Hypotheses(lines, "f")}}
    )
    examples = most_different(alone)
    assert len({example.source for example in examples}) == len(examples) > 0
    assert examples[0].outputs[-1].chrf == min(example.outputs[-1].chrf for example in examples)


def test_the_words_that_differ_are_marked() -> None:
    spans = differing("die rote Lampe ist aus", "die rote Lampe ist an")
    assert [(span.text, span.marked) for span in spans if span.text.strip()] == [
        ("die rote Lampe ist", False), ("aus", True)
    ]  # fmt: skip
    assert "".join(span.text for span in spans) == "die rote Lampe ist aus"


def test_examples_are_where_the_systems_differ_most(data: Evaluated) -> None:
    examples = most_different(data)
    assert len(examples) <= EXAMPLES
    spreads = [example.spread for example in examples]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > 50
    assert {example.direction for example in examples} == {"en-de"}
    for example in examples:
        assert example.source == ENGLISH[example.number - 1]
        assert {output.system: output.text for output in example.outputs} == {
            name: lines[example.number - 1] for name, lines in SYSTEMS.items()
        }


def test_the_page_opens_in_a_browser_and_runs_no_translation(view: Document, tmp_path: Path) -> None:
    browser = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("no Chromium: apt-get install chromium")
    page = tmp_path / "report.html"
    page.write_text(render_html(view), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    picture = tmp_path / "page.png"
    subprocess.run(
        [browser, *options, "--window-size=1280,2000", f"--screenshot={picture}", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=1800,
    )
    assert picture.stat().st_size > 50_000, "an empty page makes a small picture"
    dom = subprocess.run(
        [browser, *options, "--dump-dom", page.as_uri()], check=True, capture_output=True, text=True, timeout=1800
    ).stdout
    assert "<title>Evaluation on wmt22</title>" in dom
    assert html.escape('<script>document.title = "hacked"</script>', quote=False) in dom

    # The same text unescaped and without the page's policy does run here, so the test above means something.
    page.write_text(f"<title>fine</title>{SCRIPT}", encoding="utf-8")
    control = subprocess.run(
        [browser, *options, "--dump-dom", page.as_uri()], check=True, capture_output=True, text=True, timeout=1800
    ).stdout
    assert "<title>hacked</title>" in control
