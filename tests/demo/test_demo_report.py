"""What the demo's page says follows from the figures, whatever they are."""

from __future__ import annotations

import numpy as np

from llamafactory_sekd.demo import demo_report as report
from llamafactory_sekd.demo.references import Difficulties, References
from llamafactory_sekd.study.report.cells import Difference


def test_a_comparison_says_above_below_or_that_it_cannot_tell():
    above = Difference((1.5, 2.5), 0.5, 3.5, 0.002, 0.004)
    assert report.verdict("A", "B", above, "BLEU") == "A is 2.00 BLEU (0.50 to 3.50) above B, p = 0.004."
    below = Difference((-2.0,), -3.5, -0.5, 0.0009, 0.0009)
    assert report.verdict("A", "B", below, "chrF2") == "A is 2.00 chrF2 (0.50 to 3.50) below B, p <0.001."
    open_one = Difference((0.4,), -0.2, 1.1, 0.2, 0.4)
    told = "A and B cannot be told apart: +0.40 BLEU (−0.20 to 1.10), p = 0.400."
    assert report.verdict("A", "B", open_one, "BLEU") == told


def test_neither_a_corrected_p_nor_an_interval_alone_makes_a_claim():
    assert "cannot be told apart" in report.verdict("A", "B", Difference((2.0,), 0.5, 3.5, 0.03, 0.06), "BLEU")
    assert "cannot be told apart" in report.verdict("A", "B", Difference((2.0,), -0.1, 3.5, 0.01, 0.02), "BLEU")


def test_right_and_wrong_references_stay_apart_in_table_and_picture():
    right, wrong = np.array([0.1, 0.3, 0.5]), np.array([0.1, 3.0])
    references = References(Difficulties(np.log([2.0, 2.0]), np.log([10.0])), {"SFT": Difficulties(right, wrong)})

    section = report._references_section(references)

    ((row,),) = (table.rows for table in section.tables)
    assert [entry.text for entry in row.entries] == ["0.30", "1.55", "33", "50"]
    assert "a probability of 0.5, those of a wrong one 0.1" in section.note
    assert section.plots[0].png
