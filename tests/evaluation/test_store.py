"""Translations on disk survive whatever a killed process leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamafactory_sekd.errors import DataError, EvaluationError, one_line
from llamafactory_sekd.evaluation.systems import Translation
from llamafactory_sekd.evaluation.translation_store import Record, Store, read_hypotheses
from llamafactory_sekd.files import write_atomic


def record(index: int, text: str | None = None, hit: bool = False) -> Record:
    return Record(index, Translation(text if text is not None else f"Satz {index}", 3, hit), 0.5)


def test_finished_sentences_of_all_ranks_come_back_in_the_order_of_the_test_set(tmp_path: Path) -> None:
    store = Store(tmp_path, "en-de", 4)
    assert store.resume("f") == [0, 1, 2, 3]
    store.open_part("f", 0).append([record(3), record(0)])
    store.open_part("f", 1).append([record(2, hit=True), record(1, "")])
    done = store.finish("f", ranks=2)
    assert done.lines == ["Satz 0", "", "Satz 2", "Satz 3"]
    assert done.hit_limit == [False, False, True, False]
    assert done.seconds == 2.0
    assert store.text_path.read_text(encoding="utf-8") == "Satz 0\n\nSatz 2\nSatz 3\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["en-de.meta.json", "en-de.txt"]
    assert store.finished("f") == done


@pytest.mark.parametrize("torn", range(1, 60, 7))
def test_a_line_that_a_kill_tore_is_translated_again(tmp_path: Path, torn: int) -> None:
    store = Store(tmp_path, "en-de", 3)
    part = store.open_part("f", 0)
    part.append([record(0)])
    part.append([record(2, "größer")])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-torn])
    assert store.resume("f") == [1, 2]
    store.open_part("f", 0).append([record(1), record(2, "größer")])
    assert store.finish("f", ranks=1).lines == ["Satz 0", "Satz 1", "größer"]


def test_gathering_what_was_left_loses_nothing_where_it_cannot_be_written(tmp_path: Path) -> None:
    store = Store(tmp_path, "en-de", 3)
    store.open_part("f", 0).append([record(0)])
    store.open_part("f", 1).append([record(2)])
    obstacle = tmp_path / "..en-de.partial.jsonl.partial"  # where the file that gathers them is written first
    obstacle.mkdir()
    with pytest.raises(DataError, match=r"Cannot write .*partial\.jsonl"):
        store.resume("f")
    obstacle.rmdir()
    assert store.resume("f") == [1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_while_translating_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / ".en-de.partial.0.jsonl").symlink_to("/dev/full")
    with pytest.raises(EvaluationError) as caught:
        Store(tmp_path, "en-de", 3).open_part("f", 0).append([record(0)])
    assert "No space left on device. The same command continues from here." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_with_another_number_of_ranks_continues(tmp_path: Path) -> None:
    store = Store(tmp_path, "en-de", 5)
    for rank in range(3):
        store.open_part("f", rank).append([record(rank)])
    assert store.resume("f") == [3, 4]
    store.open_part("f", 0).append([record(4)])
    assert store.resume("f") == [3]


def test_what_another_model_translated_is_not_continued(tmp_path: Path) -> None:
    store = Store(tmp_path, "en-de", 2)
    store.open_part("old", 0).append([record(0)])
    assert store.resume("new") == [0, 1]
    assert list(tmp_path.iterdir()) == []


def test_finished_translations_are_used_only_unchanged_and_by_the_same_fingerprint(tmp_path: Path) -> None:
    store = Store(tmp_path, "en-de", 1)
    store.open_part("f", 0).append([record(0)])
    store.finish("f", ranks=1)
    assert store.finished("other") is None
    store.text_path.write_text("von Hand\n", encoding="utf-8")
    assert store.finished("f") is None
    store.text_path.unlink()
    assert store.finished("f") is None


def test_directions_of_one_system_do_not_mix(tmp_path: Path) -> None:
    Store(tmp_path, "en-de", 1).open_part("f", 0).append([record(0)])
    assert Store(tmp_path, "en-cs", 1).resume("f") == [0]
    assert Store(tmp_path, "en-de", 1).resume("f") == []


@pytest.mark.parametrize("text", ["a\nb", " a \r\n b ", "a\u2028b", "a\x85\x0bb", "a\n\nb\n"])
def test_a_translation_is_one_line_for_every_tool(text: str) -> None:
    assert one_line(text) == "a b"
    assert one_line("10\u00a0000  Stück") == "10\u00a0000  Stück"


def test_only_newlines_end_a_line_of_hypotheses(tmp_path: Path) -> None:
    path = tmp_path / "en-de.txt"
    path.write_bytes("\ufeffeins\u2028zwei\r\n\nvier".encode())
    assert read_hypotheses(path, 3) == ["eins zwei", "", "vier"]


def test_wrong_hypotheses_are_named_with_their_file(tmp_path: Path) -> None:
    path = tmp_path / "en-de.txt"
    with pytest.raises(EvaluationError, match=r"en-de\.txt do not exist"):
        read_hypotheses(path, 3)
    path.write_text("eins\nzwei\n")
    with pytest.raises(EvaluationError, match=r"en-de\.txt have 2 lines, but the test set has 3\."):
        read_hypotheses(path, 3)
    path.write_bytes(b"eins\nzw\xe4i\n")
    with pytest.raises(EvaluationError, match=r"en-de\.txt are not UTF-8 \(line 2\)\."):
        read_hypotheses(path, 2)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
