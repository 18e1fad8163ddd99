"""Scores and p-values are those of the sacrebleu command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.sentences import GERMAN, write_lines

from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.scores import mean, score_corpus, similarity, surface_metric, tokenizer_note
from llamafactory_sekd.evaluation.significance import PairedTests, corpus_statistics, holm, is_significant


Sacrebleu = Callable[..., Any]
BASELINE = [line.replace("die", "diese").replace(",", "") for line in GERMAN]
SYSTEM = [line.replace("Haus", "Gebäude") for line in GERMAN[:7]] + GERMAN[1:4]
THAI = ["ผมชอบกินข้าวผัดกับไก่ย่าง", "วันนี้อากาศดีมากและท้องฟ้าแจ่มใส", "แมวสีดำนอนหลับอยู่บนเก้าอี้ในบ้าน"]


@pytest.fixture
def sacrebleu(tmp_path: Path) -> Sacrebleu:
    """Run the command on lists of lines and return its JSON."""

    def run(texts: list[str], systems: dict[str, list[str]], *options: str, references: Sequence[str] = ()) -> Any:
        reference = write_lines(tmp_path / "reference", texts)
        files = [str(write_lines(tmp_path / name, lines)) for name, lines in systems.items()]
        command = [
            sys.executable,
            "-m",
            "sacrebleu",
            str(reference),
            *references,
            "-i",
            *files,
            "-f",
            "json",
            "-w",
            "6",
            *options,
        ]
        environment = {name: value for name, value in os.environ.items() if name != "SACREBLEU_SEED"}
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        return json.loads(output)

    return run


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bleu", ["-m", "bleu"]),
        ("chrf", ["-m", "chrf"]),
        ("chrf++", ["-m", "chrf", "--chrf-word-order", "2"]),
        ("ter", ["-m", "ter"]),
    ],
)
def test_scores_and_signatures_are_those_of_the_sacrebleu_command(
    name: str, options: list[str], sacrebleu: Sacrebleu
) -> None:
    expected = sacrebleu(GERMAN, {"system": SYSTEM}, *options)
    score = score_corpus(surface_metric(name, "de"), SYSTEM, GERMAN)
    assert score.value == pytest.approx(expected["score"], abs=1e-6)
    assert score.signature == expected["signature"]


@pytest.mark.parametrize("tokenizer", ["char", "intl", "none"])
def test_the_tokenizer_of_bleu_can_be_chosen(tokenizer: str, sacrebleu: Sacrebleu) -> None:
    expected = sacrebleu(GERMAN, {"system": SYSTEM}, "-m", "bleu", "--tokenize", tokenizer)
    for asked in (tokenizer, {"de": tokenizer, "cs": "13a"}):
        score = score_corpus(surface_metric("bleu", "de", asked), SYSTEM, GERMAN)
        assert score.value == pytest.approx(expected["score"], abs=1e-6)
        assert score.signature == expected["signature"]


def test_several_references_are_scored_as_the_command_does(sacrebleu: Sacrebleu, tmp_path: Path) -> None:
    second = str(write_lines(tmp_path / "second", BASELINE))
    for name in ("bleu", "chrf", "ter"):
        expected = sacrebleu(GERMAN, {"system": SYSTEM}, "-m", name, references=[second])
        score = score_corpus(surface_metric(name, "de"), SYSTEM, GERMAN, BASELINE)
        assert score.value == pytest.approx(expected["score"], abs=1e-6)
        assert score.signature == expected["signature"]
        assert "nrefs:2" in score.signature


@pytest.fixture
def flores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a small SentencePiece model where sacrebleu keeps that of its tokenizer flores200."""
    import sentencepiece

    folder = tmp_path / "sacrebleu"
    (folder / "models").mkdir(parents=True)
    model = folder / "models" / "small"
    text = write_lines(tmp_path / "text", [*GERMAN, *THAI] * 4)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(model), vocab_size=180, hard_vocab_limit=False, minloglevel=2
    )
    model.with_suffix(".model").rename(folder / "models" / "flores200sacrebleuspm")
    monkeypatch.setenv("SACREBLEU", str(folder))
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(folder))


@pytest.mark.usefixtures("flores")
def test_spbleu_is_that_of_the_command(sacrebleu: Sacrebleu) -> None:
    expected = sacrebleu(GERMAN, {"system": SYSTEM}, "-m", "bleu", "--tokenize", "flores200")
    score = score_corpus(surface_metric("spbleu", "de"), SYSTEM, GERMAN)
    assert score.value == pytest.approx(expected["score"], abs=1e-6)
    assert score.signature == expected["signature"]
    assert "tok:flores200" in score.signature


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in sacrebleu's folder, and nothing can be downloaded."""

    def refuse(*_: Any) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path / "nothing"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.usefixtures("offline")
def test_spbleu_without_its_tokenizer_is_one_clear_line() -> None:
    with pytest.raises(EvaluationError, match=r"^spBLEU with the tokenizer 'flores200' cannot run: no network at all"):
        surface_metric("spbleu", "de")


@pytest.mark.parametrize("code", ["th", "tha_Thai", "lo", "km", "my", "yue"])
@pytest.mark.usefixtures("offline")
def test_bleu_where_words_have_no_spaces_says_something_and_why(code: str) -> None:
    """With 13a, a sentence is one word there, and the score of the references themselves is 0."""
    metric = surface_metric("bleu", code)
    assert score_corpus(metric, THAI, THAI).value == pytest.approx(100)
    assert 0 < score_corpus(metric, [line[:-3] for line in THAI], THAI).value < 100
    assert "uses the tokenizer char: the usual 13a finds no words" in tokenizer_note(code)
    assert "means little" in tokenizer_note(code, "13a")
    assert tokenizer_note("de") == tokenizer_note("zh") == tokenizer_note(code, "char") == ""


@pytest.mark.usefixtures("flores")
def test_bleu_where_words_have_no_spaces_takes_the_tokenizer_of_flores_where_it_is() -> None:
    assert "tok:flores200" in score_corpus(surface_metric("bleu", "th"), THAI, THAI).signature


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


@pytest.mark.parametrize("kind", ["paired_bs", "paired_ar"])
def test_p_values_means_and_intervals_are_those_of_the_command(kind: str, sacrebleu: Sacrebleu) -> None:
    others = {"system": SYSTEM, "same": BASELINE}
    rows = sacrebleu(
        GERMAN, {"baseline": BASELINE, **others}, "-m", "bleu", "chrf", "ter", f"--{kind.replace('_', '-')}"
    )
    for name, label in (("bleu", "BLEU"), ("chrf", "chrF2"), ("ter", "TER")):
        metric = surface_metric(name, "de")
        statistics = {
            system: [corpus_statistics(metric, lines, GERMAN)]
            for system, lines in {"baseline": BASELINE, **others}.items()
        }
        tests = PairedTests(kind, "baseline", statistics).direction(0)
        for row, (system, test) in zip(rows, tests.items(), strict=True):
            assert row["system"].endswith(system)
            command = row[label]
            if kind == "paired_bs":
                assert test.mean == pytest.approx(command["mean"], abs=1e-5)
                assert test.ci == pytest.approx(command["ci"], abs=1e-5)
            if system != "baseline":
                assert test.p == pytest.approx(command["p_value"], abs=2e-3)


def test_the_test_over_all_directions_is_that_of_one_where_all_are_alike() -> None:
    metric = surface_metric("bleu", "de")
    one, other = (corpus_statistics(metric, lines, GERMAN) for lines in (BASELINE, SYSTEM))
    for kind in ("paired_bs", "paired_ar"):
        tests = PairedTests(kind, "baseline", {"baseline": [one, one], "system": [other, other]})
        assert tests.average() == tests.direction(0)


def test_holms_correction_is_that_of_r() -> None:
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") of R 4 gives 0.03 0.06 0.06 0.02."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"alone": 0.04}) == {"alone": 0.04}


def test_two_systems_that_are_the_same_never_differ_significantly() -> None:
    statistics = [corpus_statistics(surface_metric("bleu", "de"), BASELINE, GERMAN)]
    tests = PairedTests("paired_bs", "baseline", {"baseline": statistics, "same": statistics}).direction(0)
    p = tests["same"].p
    assert p is not None
    assert p < 0.05, "sacrebleu's p for a difference of nothing; if this changed, is_significant can be simpler"
    assert not is_significant(p, 0.0, 0.0)
    assert is_significant(0.049, -1.0, -0.1)
    assert not is_significant(0.05, 0.5, 1.0)
    assert not is_significant(0.001, -0.1, 1.0)
    assert not is_significant(None, 0.5, 1.0)


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
