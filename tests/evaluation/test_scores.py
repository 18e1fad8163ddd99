"""Scores and p-values are those of the sacrebleu command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.sentences import GERMAN, write_lines

from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.scores import mean, score_corpus, surface_metric
from llamafactory_sekd.evaluation.significance import is_significant, paired_bootstrap
from llamafactory_sekd.evaluation.similarity import similarity


Sacrebleu = Callable[..., Any]
BASELINE = [line.replace("die", "diese").replace(",", "") for line in GERMAN]
SYSTEM = [line.replace("Haus", "Gebäude") for line in GERMAN[:7]] + GERMAN[1:4]


@pytest.fixture
def sacrebleu(tmp_path: Path) -> Sacrebleu:
    """Run the command on lists of lines and return its JSON."""

    def run(references: list[str], systems: dict[str, list[str]], *options: str) -> Any:
        reference = write_lines(tmp_path / "reference", references)
        files = [str(write_lines(tmp_path / name, lines)) for name, lines in systems.items()]
        command = [sys.executable, "-m", "sacrebleu", str(reference), "-i", *files, "-f", "json", "-w", "6", *options]
        environment = {name: value for name, value in os.environ.items() if name != "SACREBLEU_SEED"}
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        return json.loads(output)

    return run


def test_scores_and_signatures_are_those_of_the_sacrebleu_command(sacrebleu: Sacrebleu) -> None:
    expected = sacrebleu(GERMAN, {"system": SYSTEM}, "-m", "bleu", "chrf")
    for name, command in zip(("bleu", "chrf"), expected, strict=True):
        score = score_corpus(surface_metric(name, "de"), SYSTEM, GERMAN)
        assert score.value == pytest.approx(command["score"], abs=1e-6)
        assert score.signature == command["signature"]


def test_chinese_is_tokenized_as_the_sacrebleu_command_does_for_a_chinese_target(sacrebleu: Sacrebleu) -> None:
    references, system = ["房子在河边。", "我们的狗睡在桌子下面。"], ["房子靠近河边。", "我们的狗在桌子下面睡。"]
    expected = sacrebleu(references, {"system": system}, "-m", "bleu", "-l", "en-zh")
    score = score_corpus(surface_metric("bleu", "zh"), system, references)
    assert score.value == pytest.approx(expected["score"], abs=1e-6)
    assert score.signature == expected["signature"]
    assert "tok:zh" in score.signature


@pytest.mark.parametrize("code", ["zh-Hant", "zho_Hans", "cmn"])
def test_the_tokenizer_of_bleu_knows_a_language_by_any_of_its_codes(code: str) -> None:
    score = score_corpus(surface_metric("bleu", code), ["房子在河边。"], ["房子在河边。"])
    assert "tok:zh" in score.signature


def test_p_values_means_and_intervals_are_those_of_paired_bs(
    sacrebleu: Sacrebleu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SACREBLEU_SEED", "1")
    others = {"system": SYSTEM, "same": BASELINE}
    rows = sacrebleu(GERMAN, {"baseline": BASELINE, **others}, "-m", "bleu", "chrf", "--paired-bs")
    for name, label in (("bleu", "BLEU"), ("chrf", "chrF2")):
        tests, signature = paired_bootstrap(surface_metric(name, "de"), GERMAN, ("baseline", BASELINE), others)
        assert "bs:1000|seed:12345" in signature
        for row, (system, test) in zip(rows, tests.items(), strict=True):
            assert row["system"].endswith(system)
            command = row[label]
            assert test.mean == pytest.approx(command["mean"], abs=1e-6)
            assert test.ci == pytest.approx(command["ci"], abs=1e-6)
            assert test.p == (pytest.approx(command["p_value"], abs=1e-6) if system != "baseline" else None)
    assert os.environ["SACREBLEU_SEED"] == "1"


def test_two_systems_that_are_the_same_never_differ_significantly() -> None:
    tests, _ = paired_bootstrap(surface_metric("bleu", "de"), GERMAN, ("baseline", BASELINE), {"same": BASELINE})
    p = tests["same"].p
    assert p is not None
    assert p < 0.05, "sacrebleu's p for a difference of nothing; if this changed, is_significant can be simpler"
    assert not is_significant(p, 0.0)
    assert is_significant(0.049, -1.0)
    assert not is_significant(0.05, 1.0)
    assert not is_significant(None, 1.0)


def test_similarity_is_bleu_against_the_teacher(sacrebleu: Sacrebleu) -> None:
    expected = sacrebleu(BASELINE, {"system": SYSTEM}, "-m", "bleu")
    assert similarity(SYSTEM, BASELINE, "de").value == pytest.approx(expected["score"], abs=1e-6)
    assert similarity(BASELINE, BASELINE, "de").value == pytest.approx(100)


def test_an_average_needs_every_direction() -> None:
    assert mean([1.0, 2.0]) == 1.5
    assert mean([1.0, None]) is None
    assert mean([]) is None


def test_a_tokenizer_that_is_not_installed_is_named() -> None:
    try:
        import MeCab  # noqa: F401
    except ImportError:
        with pytest.raises(EvaluationError, match="BLEU for the target language 'ja'"):
            surface_metric("bleu", "ja")
    else:
        pytest.skip("sacrebleu's Japanese tokenizer is installed")
