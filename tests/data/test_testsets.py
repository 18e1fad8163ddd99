"""One test set in three layouts is one test set; a broken one is an error, never fewer sentences."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.alma_files import TRICKY, write_alma

from llamafactory_sekd.data.alma import DirectorySource, make_plan, prepare_alma
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.errors import DataError, EvaluationError


WMT_XML = """<?xml version='1.0' encoding='utf-8'?>
<dataset id="wmttest2024.en-de">
  <doc origlang="en" id="a" domain="news">
    <src lang="en"><p><seg id="1">The house</seg><seg id="2">A garden</seg></p></src>
    <ref lang="de" translator="refA"><p><seg id="1">Das Haus</seg><seg id="2">Ein Garten</seg></p></ref>
    <ref lang="de" translator="refB"><p><seg id="1">Haus</seg><seg id="2">Garten</seg></p></ref>
  </doc>
  <doc origlang="en" id="b" domain="speech">
    <src lang="en"><p><seg id="1">Hello</seg></p></src>
    <ref lang="de" translator="refA"><p><seg id="1">Hallo</seg></p></ref>
    <ref lang="de" translator="refB"><p><seg id="1">Guten Tag</seg></p></ref>
  </doc>
</dataset>
"""


def _write(directory: Path, source: str, target: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "en-de.en").write_text(source, encoding="utf-8")
    (directory / "en-de.de").write_text(target, encoding="utf-8")
    return directory


@pytest.mark.parametrize("task", ["wmt22", "wmt21_valid"])
def test_three_layouts_give_the_same_sentences_and_fingerprint(tmp_path: Path, task: str) -> None:
    clone = write_alma(tmp_path / "ALMA")
    made = tmp_path / "made"
    prepare_alma(DirectorySource(clone), make_plan(["de-en"]), made)
    plain = tmp_path / "plain"
    shutil.copytree(made / task, plain)

    loaded = [load_test_set(task, path, "en-de") for path in (clone, clone / "human_written_data", made, str(plain))]

    assert list(loaded[0].sources) == [english for _, english in TRICKY]
    assert list(loaded[0].references) == [german for german, _ in TRICKY]
    assert loaded[0].direction == Direction("en", "de")
    assert all(one == loaded[0] for one in loaded)


def test_real_test_sets_have_wmt22s_sizes(alma_dir: Path) -> None:
    sizes = {"de-en": 1984, "en-de": 2037, "en-cs": 2037, "cs-en": 1448}
    assert {direction: len(load_test_set("wmt22", alma_dir, direction).sources) for direction in sizes} == sizes
    for direction in ("en-de", "cs-en"):
        assert len(load_test_set("wmt21_valid", alma_dir, direction).references) == 1002


def test_fingerprint_changes_with_any_sentence_and_with_the_border_between_sentences(tmp_path: Path) -> None:
    texts = [("a b\nc\n", "x\ny\n"), ("a\nb c\n", "x\ny\n"), ("a b\nc\n", "x\nz\n"), ("x\ny\n", "a b\nc\n")]
    loaded = [
        load_test_set("wmt22", _write(tmp_path / str(number), *text), "en-de") for number, text in enumerate(texts)
    ]

    assert len({one.fingerprint for one in loaded}) == len(texts)


def test_languages_outside_alma_work_from_plain_files(tmp_path: Path) -> None:
    (tmp_path / "cs-uk.cs").write_text("Ahoj\n", encoding="utf-8")
    (tmp_path / "cs-uk.uk").write_text("Привіт\n", encoding="utf-8")

    assert load_test_set("wmt22", tmp_path, "cs-uk").references == ("Привіт",)


def test_a_folder_with_a_test_set_is_a_task_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "medical").mkdir()
    _write(tmp_path / "medical", "a\n", "b\n")

    test_set = load_test_set("medical", tmp_path, "en-de")

    assert (test_set.task, test_set.sources, test_set.references) == ("medical", ("a",), ("b",))
    with pytest.raises(DataError, match=r"^No medical test set for cs-en in"):
        load_test_set("medical", tmp_path, "cs-en")


def test_unknown_task_directory_and_set_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"^Unknown task 'wmt99': use one of wmt22, wmt21_valid, a test set of"):
        load_test_set("wmt99", tmp_path, "en-de")
    with pytest.raises(DataError, match=r"task_dir .*nowhere is not a directory: make it with `sekd data alma --out"):
        load_test_set("wmt22", tmp_path / "nowhere", "en-de")
    with pytest.raises(DataError, match=r"^No wmt22 test set for en-de in .* `sekd data alma` makes wmt22/en-de\.en"):
        load_test_set("wmt22", tmp_path, "en-de")
    with pytest.raises(DataError, match="Unknown direction 'de'"):
        load_test_set("wmt22", tmp_path, "de")


def test_half_a_test_set_names_the_missing_half(tmp_path: Path) -> None:
    (_write(tmp_path, "a\n", "b\n") / "en-de.de").unlink()
    with pytest.raises(DataError, match=r"en-de\.de is missing next to its partner"):
        load_test_set("wmt22", tmp_path, "en-de")


def test_misaligned_or_empty_test_set_stops(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Misaligned files: .*en-de\.en has 2 lines and .*en-de\.de has 1"):
        load_test_set("wmt22", _write(tmp_path / "a", "a\nb\n", "x\n"), "en-de")
    with pytest.raises(DataError, match=r"en-de\.en holds no sentences"):
        load_test_set("wmt22", _write(tmp_path / "b", "", ""), "en-de")


def test_bad_sentence_stops_instead_of_shrinking_the_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"en-de\.de:2: one side is empty; a test set must be complete"):
        load_test_set("wmt22", _write(tmp_path, "a\nb\n", "x\n \n"), "en-de")


def test_a_flat_folder_may_have_any_task_name(tmp_path: Path) -> None:
    assert load_test_set("medical", _write(tmp_path, "a\n", "b\n"), "en-de").sources == ("a",)


def test_sources_alone_will_do_where_that_is_said(tmp_path: Path) -> None:
    (_write(tmp_path, "a\nb\n", "x\n") / "en-de.de").unlink()
    found = load_test_set("wmt22", tmp_path, "en-de", needs_references=False)
    assert (found.sources, found.references, found.reference_sets) == (("a", "b"), (), ())


def test_further_references_and_names_must_have_a_line_per_sentence(tmp_path: Path) -> None:
    _write(tmp_path, "a\nb\n", "x\ny\n")
    (tmp_path / "en-de.de.2").write_text("p\nq\n")
    (tmp_path / "en-de.docid").write_text("one\none\n")
    found = load_test_set("mine", tmp_path, "en-de")
    assert found.reference_sets == (("x", "y"), ("p", "q"))
    assert found.documents == ("one", "one")
    (tmp_path / "en-de.de.2").write_text("p\n")
    with pytest.raises(DataError, match=r"en-de\.de\.2 has 1 lines, and the sources have 2"):
        load_test_set("mine", tmp_path, "en-de")


def test_wmt24pp_is_read_from_its_files_without_what_its_authors_call_bad(tmp_path: Path) -> None:
    """The fields are those of google/wmt24pp on the Hub."""
    folder = tmp_path / "wmt24pp"
    folder.mkdir()
    rows = [
        {"lp": "en-de_DE", "domain": "canary", "document_id": "c", "segment_id": 1, "is_bad_source": True},
        {"lp": "en-de_DE", "domain": "news", "document_id": "n", "segment_id": 2, "is_bad_source": False},
    ]
    texts = {"source": "House", "target": "Haus", "original_target": "Das Haus"}
    (folder / "en-de_DE.jsonl").write_text("".join(json.dumps({**row, **texts}) + "\n" for row in rows))
    found = load_test_set("wmt24pp", tmp_path, "en-de_DE")
    assert (found.sources, found.references, found.domains, found.documents) == (
        ("House",),
        ("Haus",),
        ("news",),
        ("n",),
    )
    assert found.direction.target_language == "German (Germany)"
    assert found.notes == ("1 sources that WMT24++ marks as bad are left out.",)


def test_flores_is_read_from_its_files(tmp_path: Path) -> None:
    for part in ("dev", "devtest"):
        (tmp_path / part).mkdir()
        for code, text in (("eng_Latn", "House"), ("deu_Latn", "Haus")):
            (tmp_path / part / f"{code}.{part}").write_text(f"{text} {part}\n")
    for part in ("dev", "devtest"):
        found = load_test_set(part, tmp_path, "eng_Latn-deu_Latn")
        assert (found.sources, found.references) == ((f"House {part}",), (f"Haus {part}",))


def test_a_test_set_of_sacrebleu_is_what_its_command_scores_against(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WMT's XML as published, with two references of which sacrebleu scores against one."""
    from sacrebleu.dataset import DATASETS

    data_set = DATASETS["wmt24"]
    raw = tmp_path / "wmt24" / "raw"
    xml = raw / data_set.langpairs["en-de"][0]
    xml.parent.mkdir(parents=True)
    xml.write_text(WMT_XML, encoding="utf-8")
    (raw / data_set._get_tarball_filename(data_set.data[0])).write_text("downloaded and unpacked before")
    monkeypatch.setattr(data_set, "_outdir", str(tmp_path / "wmt24"))
    monkeypatch.setattr(data_set, "_rawdir", str(raw))

    found = load_test_set("wmt24", tmp_path, "en-de")

    command = [sys.executable, "-m", "sacrebleu", "-t", "wmt24", "-l", "en-de", "--echo", "src", "ref:refA"]
    environment = {**os.environ, "SACREBLEU": str(tmp_path)}
    echoed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert [f"{s}\t{r}" for s, r in zip(found.sources, found.reference_sets[0], strict=True)] == echoed.splitlines()
    assert found.references == ("Das Haus", "Ein Garten", "Hallo")
    assert len(found.reference_sets) == 1
    assert (found.documents, found.domains) == (("a", "a", "b"), ("news", "news", "speech"))
    assert found.origin == "sacrebleu's wmt24"
    with pytest.raises(DataError, match=r"sacrebleu's wmt24 has no de-fr, but cs-uk, en-cs,"):
        load_test_set("wmt24", tmp_path, "de-fr")


def test_a_test_set_that_cannot_be_downloaded_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sacrebleu.dataset import DATASETS

    def refuse(*_: object) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(DATASETS["wmt23"], "_outdir", str(tmp_path / "wmt23"))
    monkeypatch.setattr(DATASETS["wmt23"], "_rawdir", str(tmp_path / "wmt23" / "raw"))
    with pytest.raises(
        DataError, match=r"nor can be downloaded \(no network at all\): run `sacrebleu -t wmt23"
    ) as caught:
        load_test_set("wmt23", tmp_path, "en-de")
    assert "\n" not in str(caught.value)
