"""``sekd data pairs``: a user's own corpus, from plain text and from TSV."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.pairs import Corpus, prepare_pairs
from llamafactory_sekd.errors import ArgumentError, DataError
from llamafactory_sekd.host.data_command import app


EN_DE = Direction("en", "de")


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    (tmp_path / "train.en").write_text("one\ntwo\n\nfour\n", encoding="utf-8")
    (tmp_path / "train.de").write_text("eins\nzwei\ndrei\nvier\n", encoding="utf-8")
    return Corpus.of(tmp_path / "train.en", tmp_path / "train.de", None)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "data"


def test_text_and_tsv_give_the_same_records(corpus: Corpus, out: Path, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("one\teins\ntwo\tzwei\n\tdrei\nfour\tvier\n", encoding="utf-8")
    prepare_pairs(corpus, EN_DE, "text", out)
    prepare_pairs(Corpus.of(None, None, tmp_path / "train.tsv"), EN_DE, "tsv", out)

    records = [json.loads(line) for line in (out / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (out / "text.jsonl").read_bytes() == (out / "tsv.jsonl").read_bytes()
    assert [(record["input"], record["output"]) for record in records] == [
        ("one", "eins"),
        ("two", "zwei"),
        ("four", "vier"),
    ]
    assert records[0]["instruction"] == "Translate the following sentences from English to German.\n\n### Input:"


def test_left_out_lines_stand_in_the_manifest_with_file_and_line(corpus: Corpus, out: Path) -> None:
    manifest, _ = prepare_pairs(corpus, EN_DE, "mine", out)

    assert manifest["files"]["mine.jsonl"]["records"] == 3
    found = [(f["problem"], f["outcome"], f["file"], f["lines"]) for f in manifest["findings"]]
    assert found == [("empty_side", "left out", "train.en / train.de", [3])]


def test_declaration_joins_what_others_declared(corpus: Corpus, out: Path) -> None:
    out.mkdir()
    others = {"zeta": {"file_name": "z.json", "columns": {"prompt": "ü"}}, "alpha": {"hf_hub_url": "a/b"}}
    (out / "dataset_info.json").write_text(json.dumps(others, ensure_ascii=False), encoding="utf-8")
    prepare_pairs(corpus, EN_DE, "mine", out)

    info = json.loads((out / "dataset_info.json").read_text(encoding="utf-8"))
    assert info == {**others, "mine": {"file_name": "mine.jsonl"}}
    assert list(info) == ["zeta", "alpha", "mine"]


def test_foreign_declaration_of_the_same_name_stops_before_anything_is_written(corpus: Corpus, out: Path) -> None:
    out.mkdir()
    before = '{"mine": {"file_name": "other.json"}}'
    (out / "dataset_info.json").write_text(before)
    with pytest.raises(DataError, match=r"dataset_info\.json declares another data set 'mine': choose another name"):
        prepare_pairs(corpus, EN_DE, "mine", out)

    assert (out / "dataset_info.json").read_text() == before
    assert not (out / "mine.jsonl").exists()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_declarations_are_not_replaced(corpus: Corpus, out: Path, content: str) -> None:
    out.mkdir()
    (out / "dataset_info.json").write_text(content)
    with pytest.raises(DataError, match=r"dataset_info\.json"):
        prepare_pairs(corpus, EN_DE, "mine", out)
    assert (out / "dataset_info.json").read_text() == content


def test_second_run_verifies_and_another_corpus_needs_overwrite(corpus: Corpus, out: Path, tmp_path: Path) -> None:
    assert prepare_pairs(corpus, EN_DE, "mine", out)[1] is True
    stamp = (out / "mine.jsonl").stat().st_mtime_ns
    assert prepare_pairs(corpus, EN_DE, "mine", out)[1] is False
    assert (out / "mine.jsonl").stat().st_mtime_ns == stamp

    (tmp_path / "train.de").write_text("uno\ndos\ntres\ncuatro\n")
    with pytest.raises(DataError, match=r"was created with different options \(source\)"):
        prepare_pairs(corpus, EN_DE, "mine", out)
    prepare_pairs(corpus, EN_DE, "mine", out, overwrite=True)
    assert "cuatro" in (out / "mine.jsonl").read_text()


def test_wrong_options_are_one_clear_line(corpus: Corpus, out: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="Give either --src FILE and --tgt FILE, or --tsv FILE"):
        Corpus.of(tmp_path / "train.en", None, None)
    with pytest.raises(ArgumentError, match="Give either"):
        Corpus.of(tmp_path / "train.en", tmp_path / "train.de", tmp_path / "x.tsv")
    with pytest.raises(ArgumentError, match=r"--name '\.\./x' must consist of letters"):
        prepare_pairs(corpus, EN_DE, "../x", out)


def test_corpus_without_a_usable_pair_stops(out: Path, tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("a\t\n\tb\n")
    with pytest.raises(DataError, match=r"x\.tsv has no usable pair: 2 times: one side is empty"):
        prepare_pairs(Corpus.of(None, None, tmp_path / "x.tsv"), EN_DE, "mine", out)
    assert not (out / "mine.jsonl").exists()


def test_command_line_writes_reports_and_explains(corpus: Corpus, out: Path, tmp_path: Path) -> None:
    arguments = ["pairs", "--src", str(tmp_path / "train.en"), "--tgt", str(tmp_path / "train.de")]
    arguments += ["--from", "en", "--to", "de", "--name", "mine", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 0, result.output
    assert "1 pair left out: one side is empty: train.en / train.de:3" in result.stdout
    assert f"dataset_dir: {out}, dataset: mine, template: parrot" in result.stdout


@pytest.mark.parametrize("name", ["[red]", "a[/b]", "a; $(touch x) `x` 'ü"])
def test_a_folder_may_have_any_name_and_is_shown_as_it_is(corpus: Corpus, tmp_path: Path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["pairs", "--src", "train.en", "--tgt", "train.de", "--from", "en", "--to", "de", "--name", "mine"]
    result = CliRunner().invoke(app, [*arguments, "--out", name], env={"COLUMNS": "200"})

    assert result.exit_code == 0, result.exception
    assert f"Written to {name}" in " ".join(result.stdout.split())
    assert (tmp_path / name / "mine.jsonl").exists()


def test_command_line_stops_at_misaligned_files(corpus: Corpus, out: Path, tmp_path: Path) -> None:
    (tmp_path / "train.de").write_text("eins\n")
    arguments = ["pairs", "--src", str(tmp_path / "train.en"), "--tgt", str(tmp_path / "train.de")]
    result = CliRunner().invoke(app, [*arguments, "--from", "en", "--to", "de", "--name", "mine", "--out", str(out)])

    assert isinstance(result.exception, DataError)
    assert "has 4 lines" in str(result.exception)
    assert not (out / "mine.jsonl").exists()
