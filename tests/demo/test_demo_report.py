"""The demo's report says what the evaluation found, and what is left of it without near-duplicates."""

from __future__ import annotations

import base64
import io

import pytest
import sacrebleu
from rich.console import Console

from llamafactory_sekd.demo import demo_report as report


SOURCES = (
    ["Red lamp number 0"]
    + [f"Turn on the red lamp number {number} in the kitchen" for number in range(4)]
    + [f"Completely other words stand here, even <b>{word}</b>" for word in ("1", "2", "3", "4", "5", "6", "7")]
)
REFERENCES = [f"Schalte die rote Lampe Nummer {number} in der Küche ein" for number in range(12)]
LINES = {
    "student_sft": [f"Schalte die rote Lampe {number} in der Küche ein" for number in range(12)],
    "self_evolution": [
        *REFERENCES[:6],
        *(f"Schalte die Lampe {number} in der Küche <i>ein</i>" for number in range(6)),
    ],
    "teacher": [*REFERENCES[:11], ""],
}
NEW = [0, *range(5, 12)]
TRAINING = ["Turn on the red lamp number 7 in the kitchen", "Nothing like it"]


@pytest.fixture
def contents(tmp_path):
    for name, lines in LINES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "en-de.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    results = {
        "baseline": "student_sft",
        "systems": {
            name: {
                "scores": {"en-de": {"bleu": 10.0 + index, "chrf": 40.0 + index}},
                "similarity": None if name == "teacher" else {"en-de": 50.0 + index, "average": 50.0 + index},
            }
            for index, name in enumerate(LINES)
        },
        "significance": {
            "student_sft": {"en-de": {"bleu": {"p": None, "mean": 10.1, "ci": 1.5}}},
            "self_evolution": {"en-de": {"bleu": {"p": 0.2, "mean": 11.1, "ci": 1.6}}},
            "teacher": {"en-de": {"bleu": {"p": 0.000999, "mean": 12.1, "ci": 1.7}}},
        },
        "signatures": {"en-de": {"bleu": "nrefs:1|case:mixed"}},
    }
    return report.collect(results, tmp_path, (SOURCES, REFERENCES), TRAINING)


def test_scores_without_near_duplicates_are_sacrebleus_on_the_other_sentences(contents):
    assert (contents.sentences, contents.duplicates, contents.new) == (12, 4, 8)
    for row in contents.rows:
        expected = sacrebleu.corpus_bleu([LINES[row.name][i] for i in NEW], [[REFERENCES[i] for i in NEW]]).score
        assert row.bleu_new == pytest.approx(expected)


def test_the_other_figures_are_the_evaluations_own(contents):
    rows = {row.name: row for row in contents.rows}
    assert [(row.bleu, row.ci, row.p, row.chrf, row.similarity) for row in contents.rows] == [
        (10.0, 1.5, None, 40.0, 50.0),
        (11.0, 1.6, 0.2, 41.0, 51.0),
        (12.0, 1.7, 0.000999, 42.0, None),
    ]
    assert [rows[name].significant for name in LINES] == [False, False, True]


def test_the_examples_are_the_first_sentences_and_not_the_best_ones(contents):
    assert [example.source for example in contents.examples] == SOURCES[1:6]
    assert [example.has_duplicate for example in contents.examples] == [True] * 4 + [False]
    assert contents.examples[0].outputs[1] == ("Student, Self-Evolution KD", LINES["self_evolution"][1])


def test_the_page_holds_all_of_it_escaped_and_loads_nothing(contents, tmp_path):
    for name in report.PLOTS:
        (tmp_path / name).write_bytes(f"picture {name}".encode())

    report.write_report(tmp_path / "report.html", contents, tmp_path, ["llamafactory-cli train a.yaml"])

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in report.PLOTS:
        assert base64.b64encode(f"picture {name}".encode()).decode() in page
    assert "not the paper&#39;s ranking" in page
    assert "33 % of the held-out sources have a near-duplicate" in page
    assert "&lt;b&gt;1&lt;/b&gt;" in page
    assert "<b>1</b>" not in page
    assert "<script" not in page
    assert "://" not in page
    assert "llamafactory-cli train a.yaml" in page


def test_the_terminal_says_what_the_figures_mean(contents):
    console = Console(file=io.StringIO(), width=80)
    report.print_table(console, contents)
    text = console.file.getvalue()
    assert "10.0 ± 1.5" in text
    assert "12.0 ± 1.7†" in text
    assert "<0.001" in text
    assert "…" not in text  # nothing is cut in a terminal of the usual width
    assert "not the paper's ranking" in text
