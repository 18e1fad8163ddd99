"""The study's report says what results.json and the translations say, and nothing in them can act in it."""

from __future__ import annotations

import copy
import io
import re
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers.latex_tables import faults_of
from helpers.study_results import SEEDS, SYSTEMS, without_select, write_study
from rich.console import Console
from sacrebleu.metrics.bleu import BLEU

from llamafactory_sekd.evaluation.evaluation_settings import parse_settings
from llamafactory_sekd.evaluation.significance import noticed
from llamafactory_sekd.reporting.document import Document, Section, Table
from llamafactory_sekd.study.report.cells import Difference, read_study
from llamafactory_sekd.study.report.study_report import build_document, write
from llamafactory_sekd.study.report.views import noticed_table


SCRIPT = "<script>document.title = 'hacked'</script> $x_1$ *fett*"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return write_study(folder)


@pytest.fixture(scope="module")
def document(results: dict[str, Any], folder: Path) -> Document:
    return build_document(read_study(results, folder))


@pytest.fixture(scope="module")
def plain(results: dict[str, Any], folder: Path) -> Document:
    return build_document(read_study(without_select(results), folder))


def section(document: Document, start: str) -> Section:
    return next(one for one in document.sections if one.title.startswith(start))


def column(table: Table, name: str, group: str = "") -> int:
    (found,) = (i for i, one in enumerate(table.columns) if (one.name, one.group) == (name, group))
    return found


def averages(results: dict[str, Any]) -> dict[tuple[str, float, int], float]:
    """BLEU in the average, by system, learning rate and seed."""
    return {
        (cell["system"], cell["axes"]["learning_rate"], cell["seed"]): cell["scores"]["average"]["bleu"]
        for cell in results["cells"]
    }


def test_the_table_is_the_mean_and_the_standard_deviation_of_sacrebleus_scores(
    plain: Document, results: dict[str, Any], folder: Path
) -> None:
    (table,) = section(plain, "Scores").tables
    assert table.heads == ("system", "learning_rate")
    assert [(one.group, one.name) for one in table.columns] == [
        (column, metric) for column in ("en-de", "de-en", "average") for metric in ("BLEU", "chrF2")
    ]
    assert [row.names for row in table.rows] == [
        ("Teacher", ""), *((system, rate) for system in SYSTEMS for rate in ("0.0005", "0.001"))
    ]  # fmt: skip
    references = (folder / "task" / "en-de.de").read_text().splitlines()
    for row in table.rows[1:]:
        scores = [
            BLEU().corpus_score((folder / cell["hypotheses"]["en-de"]).read_text().splitlines(), [references]).score
            for cell in results["cells"]
            if (cell["system"], f"{cell['axes']['learning_rate']:g}") == row.names
        ]
        assert len(scores) == len(SEEDS)
        found = row.entries[column(table, "BLEU", "en-de")]
        assert (found.text, found.spread) == (f"{statistics.mean(scores):.2f}", f"{statistics.stdev(scores):.2f}")


def test_each_system_is_shown_at_its_own_best_value_next_to_the_table_of_all(
    document: Document, results: dict[str, Any]
) -> None:
    best = section(document, "Scores, each system at its own best learning_rate")
    assert [row.names for row in best.tables[0].rows] == [
        ("Teacher", ""), ("SFT", "0.001"), ("Forward KD", "0.0005"), ("Self-Evolution KD", "0.001")
    ]  # fmt: skip
    assert len(section(document, "Scores at equal settings").tables[0].rows) == 7
    # Differences are to the baseline at *its* best value.
    cells = averages(results)
    expected = statistics.mean(cells["Forward KD", 0.0005, s] - cells["SFT", 0.001, s] for s in SEEDS)
    entry = best.tables[0].rows[2].entries[column(best.tables[0], "BLEU", "average")]
    assert entry.small == f"{expected:+.2f}".replace("-", "−")
    chosen = section(document, "How learning_rate was chosen")
    assert [[entry.best for entry in row.entries] for row in chosen.tables[0].rows] == [
        [False, True], [True, False], [False, True]
    ]  # fmt: skip
    assert "at the edge" in chosen.alarm


def test_a_clear_lead_gets_a_dagger_and_the_baseline_none(document: Document) -> None:
    rows = section(document, "Scores, each").tables[0].rows
    marks = {row.names[0]: [entry.mark for entry in row.entries] for row in rows}
    assert marks["Self-Evolution KD"] == ["†"] * 6
    assert marks["SFT"] == [""] * 6
    assert [row.role for row in rows] == ["teacher", "baseline", "", ""]
    assert not any(entry.best for entry in rows[0].entries), "the teacher takes no part in the best"
    assert all(entry.best for entry in rows[3].entries)


def test_what_people_notice_is_what_an_evaluation_says(document: Document, results: dict[str, Any]) -> None:
    noticed_by_people = section(document, "Noticed by people")
    (table,) = noticed_by_people.tables
    assert noticed_by_people.main, "it is in the terminal and in LaTeX, too"
    assert [(found.group, found.name) for found in table.columns] == [
        (where, metric) for where in ("en-de", "de-en", "average") for metric in ("BLEU", "chrF2")
    ]
    assert [row.names[0] for row in table.rows] == ["Teacher", "Forward KD", "Self-Evolution KD"]
    cells = averages(results)
    mean = statistics.mean(cells["Forward KD", 0.0005, seed] - cells["SFT", 0.001, seed] for seed in SEEDS)
    systems = {name: {"scores": {"average": {"bleu": value}}} for name, value in (("base", 0.0), ("own", mean))}
    config = {"task": "t", "directions": ["en-de"], "metrics": ["bleu"], "save_dir": "x", "baseline": "base"}
    settings = parse_settings({**config, "systems": {name: {"hypotheses": "x"} for name in systems}}, "eval.yaml")
    expected = noticed(systems, settings)["own"]["average"]["bleu"]
    assert table.rows[1].entries[column(table, "BLEU", "average")].text == f"{100 * expected:.0f} %"


@pytest.mark.parametrize(
    ("about", "shown"),
    [
        ({"metric_models": {"comet": "Unbabel/wmt22-comet-da"}}, {"BLEU": "≤ 50 %", "COMET": "91 %"}),
        ({"metric_models": {"comet": "my/model"}}, {"BLEU": "≤ 50 %"}),
        ({}, {"BLEU": "≤ 50 %"}),  # written by an earlier version
        ({"metric_models": {"comet": "Unbabel/wmt22-comet-da"}, "bleu_tokenizer": "intl"}, {"COMET": "91 %"}),
        ({"bleu_tokenizer": "intl"}, None),
    ],
)
def test_only_metrics_with_a_published_relation_are_noticed(
    about: dict[str, Any], shown: dict[str, str] | None, results: dict[str, Any], folder: Path
) -> None:
    one = copy.deepcopy(results)
    one["metrics"].append("comet")
    one["test_set"] |= about
    for cell in (*one["cells"], *one["models"]):
        cell["scores"]["average"]["comet"] = 0.8
    study = read_study(one, folder)
    table = noticed_table(study, study.groups[:1], lambda *_: Difference((0.01,), 0.0, 0.0, 0.01))
    found = table and {name.name: entry.text for name, entry in zip(table.columns, table.rows[0].entries, strict=True)}
    assert found == shown


def test_equal_settings_are_compared_at_the_same_point(plain: Document, results: dict[str, Any]) -> None:
    (table,) = section(plain, "Scores").tables
    cells = averages(results)
    for row in table.rows[3:]:
        rate = float(row.names[1])
        expected = statistics.mean(cells[row.names[0], rate, s] - cells["SFT", rate, s] for s in SEEDS)
        assert row.entries[column(table, "BLEU", "average")].small == f"{expected:+.2f}".replace("-", "−")


def test_the_plots_follow_from_the_shape_of_the_study(document: Document, plain: Document) -> None:
    def names(one: Document) -> list[str]:
        return [plot.name for section in one.sections for plot in section.plots]

    assert names(document) == ["selection_learning_rate", "differences", "similarity", "gate", "learning", "frequency"]
    by_system = ["gate_2", "gate_3", "learning_1", "learning_2", "learning_3"]
    assert names(plain) == ["differences", "over_learning_rate", "similarity", *by_system]


def test_progressive_beta_appears_next_to_the_fixed_one(results: dict[str, Any], folder: Path) -> None:
    moved = copy.deepcopy(results)
    for cell in moved["cells"]:
        cell["config"] |= {"stage": "sekd", "kd_loss": "skew"}
        if cell["system"].startswith("Self"):
            cell["config"]["kd_beta_end"] = 1.0
    found = build_document(read_study(moved, folder))
    assert [plot.name for plot in section(found, "Progressive").plots] == ["progressive"]


def test_missing_runs_are_named_and_the_others_reported(results: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    partial = copy.deepcopy(results)
    first, second = partial["cells"][0], partial["cells"][7]
    first |= {"scores": None, "training": None, "validation": None, "history": None}
    second["scores"] = None
    partial["models"][0]["scores"] = None
    missing = build_document(read_study(partial, folder)).sections[0]
    assert missing.title == "What is missing"
    assert "3 of 19 runs" in missing.alarm
    assert missing.lines == (
        "SFT, learning_rate = 0.0005, seed 1 (not trained)",
        "Forward KD, learning_rate = 0.0005, seed 2 (not evaluated)",
        "Teacher (not evaluated)",
    )
    for cell in partial["cells"]:
        cell["scores"] = None
    partial["selection"] = [{**row, "value": None, "by_value": []} for row in partial["selection"]]
    nothing = write(partial, tmp_path)
    assert "19 of 19 runs" in nothing[0].read_text()


def test_translations_that_are_gone_cost_the_tests_and_not_the_report(results: dict[str, Any], folder: Path) -> None:
    gone = copy.deepcopy(results)
    gone["cells"][3]["hypotheses"]["en-de"] = "nowhere.txt"
    found = build_document(read_study(gone, folder))
    scores = section(found, "Scores, each")
    assert "nowhere.txt do not exist" in scores.alarm
    assert not any(entry.mark for row in scores.tables[0].rows for entry in row.entries)
    assert not any(one.title.startswith("Hard and easy") for one in found.sections)


def test_training_text_that_is_gone_is_said(results: dict[str, Any], folder: Path) -> None:
    gone = copy.deepcopy(results)
    for cell in gone["cells"]:
        cell["config"]["dataset_dir"] = "nowhere"
    assert "nowhere" in section(build_document(read_study(gone, folder)), "Rare and frequent").alarm


def test_cost_is_told_against_the_baseline_without_interrupted_runs(results: dict[str, Any], folder: Path) -> None:
    resumed = copy.deepcopy(results)
    for cell in resumed["cells"]:
        if cell["seed"] == 1:
            cell["training"] |= {"resumed": True, "seconds": 0.1}
    costs = section(build_document(read_study(resumed, folder)), "What training costs")
    (table,) = costs.tables
    rows = {row.names[0]: [entry.text for entry in row.entries] for row in table.rows}
    assert rows["SFT"][:2] == ["35.5", "1.00 ×"]
    assert rows["Self-Evolution KD"][:2] == ["49.5", f"{49.5 / 35.5:.2f} ×"]
    assert "interrupted are left out (3)" in costs.note


def test_the_main_table_is_printed_with_every_system(results: dict[str, Any], folder: Path) -> None:
    printed = io.StringIO()
    write(results, folder, console=Console(width=200, file=printed))
    assert "BLEU" in printed.getvalue()
    assert [name for name in SYSTEMS if name not in printed.getvalue()] == []


@pytest.mark.parametrize(("name", "title"), [("table1", "Study table1"), ("study", "study"), ("Study 2", "Study 2")])
def test_the_title_names_the_study_once(results: dict[str, Any], folder: Path, name: str, title: str) -> None:
    assert build_document(read_study({**results, "study": name}, folder)).title == title


def test_both_reports_and_all_plots_are_written_the_same_each_time(
    results: dict[str, Any], folder: Path, document: Document
) -> None:
    target = folder
    written = write(results, target)
    plots = [plot.name for one in document.sections for plot in one.plots]
    assert [path.relative_to(target).as_posix() for path in written] == [
        "report.md", "report.html", "report.tex",
        *(f"plots/{name}.{kind}" for name in plots for kind in ("png", "svg"))
    ]  # fmt: skip
    before = {path: path.read_bytes() for path in written}
    assert {path: path.read_bytes() for path in write(results, target)} == before
    for path, content in before.items():
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG")
        if path.suffix == ".svg":
            ElementTree.fromstring(content)
    markdown = before[target / "report.md"].decode()
    assert all(f"](plots/{name}.png)" in markdown for name in plots)
    assert not list(folder.rglob(".*.partial"))


def test_names_are_escaped_everywhere(results: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    hostile = copy.deepcopy(results)
    hostile["study"] = SCRIPT
    hostile["spec"]["systems"] = {SCRIPT if name == "Forward KD" else name: {} for name in SYSTEMS}
    for row in (*hostile["cells"], *hostile["selection"]):
        row["system"] = SCRIPT if row["system"] == "Forward KD" else row["system"]
    for cell in hostile["cells"]:
        cell["config"] |= {"template": SCRIPT, **({"kd_loss": SCRIPT} if cell["system"] == SCRIPT else {})}
        cell["history"] = str(folder / cell["history"])
        cell["hypotheses"] = {direction: str(folder / path) for direction, path in cell["hypotheses"].items()}
    paths = {direction: str(folder / path) for direction, path in hostile["models"][0]["hypotheses"].items()}
    hostile["models"][0]["hypotheses"] = paths
    markdown, page, tex, *plots = [path.read_text() for path in write(hostile, tmp_path) if path.suffix != ".png"]
    for text in (markdown, page, *plots):
        assert "<script" not in text
        assert "hacked" in text or text in plots  # letters of a plot are shapes
    assert faults_of(tex) == []
    assert "&lt;script&gt;document.title" in page
    assert r"\*fett\*" in markdown
    assert not re.search(r"<(script|link|iframe)|<[^>]*\s(src|href)=\"(?!data:image/svg)|url\(|@import", page)


def test_the_page_opens_in_a_browser(results: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    browser = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium: apt-get install chromium")
    page = next(path for path in write(results, folder) if path.suffix == ".html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    picture = tmp_path / "page.png"
    subprocess.run(
        [browser, *options, "--window-size=1280,6000", f"--screenshot={picture}", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=1800,
    )
    assert picture.stat().st_size > 200_000, "the plots are part of the page"
