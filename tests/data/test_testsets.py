"""One test set in three layouts is one test set; a broken one is an error, never fewer sentences."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.alma_files import TRICKY, write_alma

from llamafactory_sekd.data.alma import make_plan, prepare_alma
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.sources import DirectorySource
from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.errors import DataError, EvaluationError


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
    with pytest.raises(EvaluationError, match=r"^Unknown task 'wmt23': use one of wmt22, wmt21_valid, or a folder in"):
        load_test_set("wmt23", tmp_path, "en-de")
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
