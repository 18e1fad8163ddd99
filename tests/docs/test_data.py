"""The tables of the pages are those that the CSV files in ``docs/data`` give."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


FILE = Path(__file__).parents[2] / "docs" / "data" / "recompute.py"


@pytest.fixture(scope="module")
def recompute():
    spec = importlib.util.spec_from_file_location("docs_recompute", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_of_the_pages_can_be_recomputed(recompute):
    pages = {page.name: page.read_text(encoding="utf-8") for page in recompute.PAGES}
    assert sum(page.count("<!-- data: ") for page in pages.values()) >= 2
    for name, page in pages.items():
        assert recompute.recomputed(page) == page, name


def test_another_figure_is_another_table(recompute, tmp_path, monkeypatch):
    for file in FILE.parent.glob("*.csv"):
        (tmp_path / file.name).write_text(file.read_text(encoding="utf-8").replace("0", "1"), encoding="utf-8")
    monkeypatch.setattr(recompute, "HERE", tmp_path)
    page = recompute.PAGES[0].read_text(encoding="utf-8")
    assert recompute.recomputed(page) != page


def test_an_export_replaces_the_rows_of_its_data_and_keeps_the_others(recompute, tmp_path, monkeypatch):
    monkeypatch.setattr(recompute, "HERE", tmp_path)
    recompute._replace("some", [{"system": "A", "data": "noisy"}, {"system": "B", "data": "clean"}])
    recompute._replace("some", [{"system": "C", "data": "clean"}])
    kept = [(row["system"], row["data"]) for row in recompute._read("some")]
    assert kept == [("C", "clean"), ("A", "noisy")]
