"""Difficulty by token frequency: classes of equal mass, means by occurrences, averaged over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.study_results import RATES, SYSTEMS, write_study

from llamafactory_sekd.arguments import TOKEN_TABLE
from llamafactory_sekd.study.report.cells import read_study
from llamafactory_sekd.study.report.study_report import build_document
from llamafactory_sekd.study.report.training_sections import token_classes


# id -> occurrences: 100 in all, so that each class has about 20 of them.
COUNTS = {7: 40, 3: 20, 11: 10, 5: 10, 9: 8, 1: 8, 2: 2, 4: 2}
CLASS_OF = {7: 1, 3: 2, 11: 3, 5: 3, 9: 4, 1: 4, 2: 4, 4: 4}


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    found = write_study(tmp_path)
    for cell in found["cells"]:
        if cell["config"]["stage"] == "sekd":
            table = tmp_path / cell["model"] / TOKEN_TABLE
            table.parent.mkdir(parents=True)
            rows = [f"{token},x,{count},{token * cell['seed']},0.{token % 10}" for token, count in COUNTS.items()]
            table.write_text("\n".join(["id,token,count,difficulty,hard", *rows, ""]), encoding="utf-8")
    return found


def test_classes_have_equal_mass_and_means_are_over_occurrences(results: dict[str, Any], tmp_path: Path) -> None:
    study = read_study(results, tmp_path)
    found = token_classes(study, study.groups)
    assert found is not None
    assert {group.system for group in found.means} == SYSTEMS.keys() - {"SFT"}
    assert len(found.means) == 2 * len(RATES)
    assert found.sizes == tuple(list(CLASS_OF.values()).count(index) for index in range(5))
    for by_metric in found.means.values():
        for index, (difficulty, hard) in enumerate(zip(by_metric["difficulty"], by_metric["hard"], strict=True)):
            tokens = [token for token, place in CLASS_OF.items() if place == index]
            if not tokens:
                assert difficulty is None
                continue
            mass = sum(COUNTS[token] for token in tokens)
            mean = sum(token * COUNTS[token] for token in tokens) / mass
            assert difficulty is not None
            assert hard is not None
            assert difficulty.mean == pytest.approx(2 * mean)  # of the seeds 1, 2 and 3
            assert difficulty.sd == pytest.approx(mean)
            assert hard.mean == pytest.approx(sum((token % 10) / 10 * COUNTS[token] for token in tokens) / mass)


def test_the_report_has_a_column_for_each_class_and_metric(results: dict[str, Any], tmp_path: Path) -> None:
    document = build_document(read_study(results, tmp_path))
    (section,) = (one for one in document.sections if one.title.startswith("Rare and frequent tokens"))
    (table,) = section.tables
    assert [column.name for column in table.columns] == ["0", "1", "1", "2", "4"] * 2
    assert {row.names[0] for row in table.rows} == SYSTEMS.keys() - {"SFT"}
    (plot,) = section.plots
    assert plot.png.startswith(b"\x89PNG")


def test_without_tables_there_is_no_such_section(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path), tmp_path)
    assert token_classes(study, study.groups) is None
