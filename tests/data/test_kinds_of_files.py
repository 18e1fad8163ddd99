"""Corpora as they come: compressed, as JSON Lines, with a header, or not text at all."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llamafactory_sekd.data.checks import Findings, Pair, Problem, clean_pairs
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.readers import json_pairs, read_lines, read_text_pairs, tsv_pairs
from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.errors import DataError
from llamafactory_sekd.host.data_command import app


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_text_is_read_whatever_its_name(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "x.txt").write_bytes(pack("eins\nzwei ü\n".encode()))

    assert read_lines(tmp_path / "x.txt") == ["eins", "zwei ü"]


def test_broken_archive_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"eins\n" * 1000)[:-9])
    with pytest.raises(DataError, match=r"Cannot unpack .*x\.gz .*download it again"):
        read_lines(tmp_path / "x.gz")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PK\x03\x04rest", "a zip archive"),
        (b"PAR1rest", "a Parquet file"),
        (b"\x80\x04\x95rest", "a Python pickle"),
        (b"\x28\xb5\x2f\xfdrest", "compressed with zstd"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"ARROW1\x00\x00rest", "an Arrow file"),
        (b"\xff\xff\xff\xff\x78\x01\x00\x00rest", "an Arrow stream"),
        (b"SQLite format 3\x00rest", "a database of SQLite"),
        (b"7z\xbc\xaf\x27\x1crest", "a 7z archive"),
        (b"\x04\x22\x4d\x18rest", "compressed with lz4"),
        (b"{\\rtf1\\ansi Haus}\n", "an RTF document"),
        (b"x.en".ljust(257, b"\x00") + b"ustar\x0000rest", "a tar archive"),
        (gzip.compress(b"x.en".ljust(257, b"\x00") + b"ustar  \x00rest", mtime=0), "a tar archive"),
        (b"\n<!DOCTYPE html><html>404</html>", "an HTML page"),
        (gzip.compress(b"PK\x03\x04rest", mtime=0), "a zip archive"),
        ("hallo welt\n".encode("utf-16-le"), "UTF-16"),
        ("hallo welt\n".encode("utf-16-be"), "UTF-16"),
        ("hallo welt\n".encode("utf-32-le"), "UTF-32"),
        ("hallo welt\n".encode("utf-32"), "UTF-32"),
    ],
    ids=[
        *("zip", "parquet", "pickle", "zstd", "lfs", "arrow", "arrow stream", "sqlite", "7z", "lz4", "rtf", "tar"),
        *("tar in gzip", "html", "zip in gzip", "utf-16-le", "utf-16-be", "32-le", "32"),
    ],
)
def test_file_that_is_no_text_is_called_what_it_is(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DataError, match=words):
        read_lines(tmp_path / "x")


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x7f", "\x9f"])
def test_control_character_inside_a_sentence_leaves_the_pair_out(character: str) -> None:
    findings = Findings()

    assert clean_pairs([Pair(f"a{character}b", "c", "f", 3)], findings) == []
    assert [(problem.key, line) for problem, _, line in findings.items] == [("control_character", 3)]


@pytest.mark.parametrize("header", ["source\ttarget", "en\tde", "English\tGerman", '"src"\t"tgt"'])
def test_names_of_columns_are_not_a_pair(tmp_path: Path, header: str) -> None:
    (tmp_path / "x.tsv").write_text(f"{header}\nGo\tLos\n")
    with pytest.raises(DataError, match=r"x\.tsv:1: .* look like the names of the columns"):
        list(tsv_pairs(tmp_path / "x.tsv", Direction("en", "de")))


def _run(folder: Path, *arguments: str) -> list[dict[str, str]]:
    result = CliRunner().invoke(app, ["pairs", *arguments, "--name", "mine", "--out", str(folder)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return [json.loads(line) for line in (folder / "mine.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("nested", [True, False])
def test_json_lines_give_records_in_both_directions(tmp_path: Path, nested: bool) -> None:
    sides = {"en": "Go", "de": "Los"}
    (tmp_path / "x.jsonl").write_text(json.dumps({"translation": sides} if nested else sides) + "\n")

    records = _run(tmp_path / "out", "--json", str(tmp_path / "x.jsonl"), "--from", "en", "--to", "de", "--both")

    assert [(r["input"], r["output"]) for r in records] == [("Go", "Los"), ("Los", "Go")]
    assert "from German to English" in records[1]["instruction"]


def test_plain_records_have_no_heading_and_the_manifest_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("Go\tqapla\n")

    options = ("--tsv", str(tmp_path / "x.tsv"), "--from", "en", "--to", "xx", "--to-name", "Klingon", "--plain")
    records = _run(tmp_path / "out", *options)

    assert records[0]["instruction"].strip() == "Translate the following sentences from English to Klingon."
    manifest = json.loads((tmp_path / "out" / "mine.manifest.json").read_text(encoding="utf-8"))
    assert manifest["request"]["prompt"] == "plain"
    again = CliRunner().invoke(app, ["pairs", *options[:-1], "--name", "mine", "--out", str(tmp_path / "out")])
    assert "different options (prompt)" in str(again.exception)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"one,eins\ntwo,zwei\n", "1 column instead of 2 .* convert CSV, TMX or XLIFF"),
        (b'<?xml version="1.0"?><tmx version="1.4"/>', "1 column instead of 2"),
        (b"one\teins\rtwo\tzwei\r", "the lines end with carriage returns alone"),
        (b"one\teins\t0.93\n", "3 columns instead of 2"),
    ],
)
def test_another_layout_than_tsv_is_called_what_it_is(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "x.tsv").write_bytes(text)
    with pytest.raises(DataError, match=words):
        list(tsv_pairs(tmp_path / "x.tsv"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Das HÃ¤uschen ist Ã¼ber dem Fluss.", Problem.MOJIBAKE),
        ("Er sagte â€žneinâ€œ.", Problem.MOJIBAKE),
        ("<p>Das Haus ist rot.</p>", Problem.MARKUP),
        ("Das H&auml;uschen &#8211; rot.", Problem.MARKUP),
        ("Das Haus\u200b ist rot.", Problem.INVISIBLE),
        ("Das Haus\u00adchen ist rot.", Problem.INVISIBLE),
        ("\u202eDas Haus ist rot.", Problem.INVISIBLE),
        ("Das Haus ist rot \ue000.", Problem.INVISIBLE),
        ("Das Ha\u0308uschen ist rot.", Problem.DECOMPOSED),
        ("\u1112\u1161\u11ab 집", Problem.DECOMPOSED),
    ],
)
def test_suspicious_text_is_kept_unchanged_and_counted(text: str, problem: Problem) -> None:
    pairs = [Pair(text, "The house is red.", "f", 1), Pair("The house is red.", text, "f", 2)]
    findings = Findings()
    assert clean_pairs(pairs, findings) == pairs
    assert findings.items == [(problem, "f", 1), (problem, "f", 2)]


@pytest.mark.parametrize(
    "text",
    [
        "Wo ist Ândrea, die Âme, und AÇÃO?",
        "a < b & c > d; R&D; 5 € bei H&M.",
        "می\u200cخواهم",
        "क्\u200dष",
        "שלום\u200f!",
        "q\u0303 hat kein eigenes Zeichen",
        "한국어 집",
    ],
)
def test_text_that_other_scripts_and_shops_need_is_no_finding(text: str) -> None:
    findings = Findings()
    assert len(clean_pairs([Pair(text, "The house is red.", "f", 1)], findings)) == 1
    assert not findings.items


@pytest.mark.parametrize(("others", "counted"), [(0, 12), (1, 0)], ids=["all", "speech"])
def test_a_tsv_with_all_its_pairs_in_quotation_marks_is_counted(tmp_path: Path, others: int, counted: int) -> None:
    lines = [*(f'"The house {n}."\t"Das Haus {n}."' for n in range(12)), *["A dog.\tEin Hund."] * others]
    (tmp_path / "x.tsv").write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "out"
    files = ["--tsv", str(tmp_path / "x.tsv"), "--out", str(out)]
    assert CliRunner().invoke(app, ["pairs", "--from", "en", "--to", "de", "--name", "mine", *files]).exit_code == 0
    findings = json.loads((out / "mine.manifest.json").read_text(encoding="utf-8"))["findings"]
    assert [(found["problem"], found["count"]) for found in findings] == [("quotation_marks", 12)][: bool(counted)]


def test_plain_files_whose_lines_end_with_carriage_returns_are_called_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "x.en").write_bytes(b"one\rtwo\rthree\r")
    (tmp_path / "x.de").write_bytes(b"eins\rzwei\rdrei\r")
    with pytest.raises(DataError, match="the lines end with carriage returns alone"):
        read_text_pairs(tmp_path / "x.en", tmp_path / "x.de")


LONG = {
    "en": "After the storm, many trees lay across the road and the fire brigade worked through the night.",
    "de": "Nach dem Sturm lagen viele Bäume auf der Straße, und die Feuerwehr arbeitete die ganze Nacht.",
    "fr": "Après la tempête, de nombreux arbres gisaient sur la route et les pompiers ont travaillé toute la nuit.",
}


def _found(folder: Path, pairs: list[tuple[str, str]], *arguments: str) -> dict[str, tuple[int, list[int]]]:
    """Run the command on pairs that are English and German; return the findings: count and lines of each."""
    (folder / "x.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in pairs), encoding="utf-8")
    words = ["--tsv", str(folder / "x.tsv"), *(arguments or ("--from", "en", "--to", "de"))]
    _run(folder, *words)
    findings = json.loads((folder / "mine.manifest.json").read_text(encoding="utf-8"))["findings"]
    return {finding["problem"]: (finding["count"], finding["lines"]) for finding in findings}


def test_sides_in_the_wrong_order_are_counted_and_named(tmp_path: Path) -> None:
    right = [(f"{LONG['en']} {number}", f"{LONG['de']} {number}") for number in range(6)]
    wrong = [(target, source) for source, target in right]
    for number, (pairs, found) in enumerate(
        [
            (right, {}),
            (wrong, {"swapped_sides": (6, [1, 2, 3, 4, 5, 6])}),
            (right[:4] + wrong[4:], {"swapped_sides": (2, [5, 6])}),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        assert _found(tmp_path / str(number), pairs) == found


def test_another_language_than_the_one_that_was_said_is_found_where_it_is_more_than_chance(tmp_path: Path) -> None:
    pairs = [(f"{LONG['en']} {number}", f"{LONG['fr']} {number}") for number in range(4)]
    for name, arguments, found in (
        ("a", ("--from", "en", "--to", "de"), {"unexpected_language": (4, [1, 2, 3, 4])}),
        ("b", ("--from", "en", "--to", "fr"), {}),
        ("c", ("--from", "en", "--to", "yo"), {}),  # the identifier does not know it
    ):
        (tmp_path / name).mkdir()
        assert _found(tmp_path / name, pairs, *arguments) == found


def test_a_megabyte_on_one_line_is_kept_and_counted(tmp_path: Path) -> None:
    found = _found(tmp_path, [("Go", "Los"), ("a" * 1_000_000, "b"), ("c", "d" * 4999)])
    assert found == {"very_long": (1, [2])}


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("llamafactory_sekd.data.readers.LONGEST_LINE", 1000)
    monkeypatch.setattr("llamafactory_sekd.data.readers._CHUNK", 100)
    (tmp_path / "x.txt").write_text("eins\n" + "a" * 5000)
    with pytest.raises(DataError, match=r"x\.txt:2: a line of more than 1,000 characters"):
        read_lines(tmp_path / "x.txt")
    (tmp_path / "x.json").write_text('[{"de": "eins", "en": "one"}, {"de": "' + "a" * 5000)
    with pytest.raises(DataError, match=r"x\.json:1: not valid JSON"):
        list(json_pairs(tmp_path / "x.json", Direction("de", "en"), columns=True))


def test_a_json_list_on_one_line_is_read_in_pieces(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("llamafactory_sekd.data.readers.LONGEST_LINE", 1000)
    monkeypatch.setattr("llamafactory_sekd.data.readers._CHUNK", 100)
    records = [{"de": f"eins {number}", "en": f"one {number}"} for number in range(100)]
    (tmp_path / "x.json").write_text("\n\n " + json.dumps(records))
    pairs = list(json_pairs(tmp_path / "x.json", Direction("de", "en"), columns=True))
    assert [pair.source for pair in pairs] == [record["de"] for record in records]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c"])
def test_what_only_some_tools_take_for_a_line_break_shifts_no_line(tmp_path: Path, inside: str) -> None:
    found = _found(tmp_path, [("one", "eins"), (f"two{inside}and more", "zwei und mehr"), ("three", "drei")])
    assert found == {"line_break": (1, [2])}
    records = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text("utf-8").split("\n") if line]
    assert [(record["input"], record["output"]) for record in records] == [
        ("one", "eins"),
        ("two and more", "zwei und mehr"),
        ("three", "drei"),
    ]


def test_blank_lines_at_the_end_of_one_file_are_misalignment_and_of_both_are_counted(tmp_path: Path) -> None:
    (tmp_path / "x.en").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n\r\n")
    (tmp_path / "x.de").write_text("eins\nzwei\n")
    with pytest.raises(DataError, match=r"x\.en has 4 lines and .*x\.de has 2"):
        read_text_pairs(tmp_path / "x.en", tmp_path / "x.de")
    (tmp_path / "x.de").write_text("eins\nzwei\n\n\n")
    findings = Findings()
    assert [pair.source for pair in clean_pairs(read_text_pairs(tmp_path / "x.en", tmp_path / "x.de"), findings)] == [
        "one",
        "two",
    ]
    assert [problem.key for problem, _, _ in findings.items] == ["blank", "blank"]


def test_lists_inside_lists_without_end_are_one_line(tmp_path: Path) -> None:
    for text in ("[" * 100_000, '{"de": ' * 100_000):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError, match=r"x\.json:1: .*inside each other without end"):
            list(json_pairs(tmp_path / "x.json", Direction("de", "en")))


def test_two_lines_that_end_with_carriage_returns_alone_are_called_so(tmp_path: Path) -> None:
    (tmp_path / "x.en").write_bytes(b"one\rtwo\r")
    (tmp_path / "x.de").write_bytes(b"eins\nzwei\n")
    with pytest.raises(DataError, match=r"x\.en:1: the lines end with carriage returns alone"):
        read_text_pairs(tmp_path / "x.en", tmp_path / "x.de")


def test_a_test_set_notes_swapped_sides_and_lines_that_are_no_sentence(tmp_path: Path) -> None:
    (tmp_path / "en-de.en").write_text(f"{LONG['de']} 1\n{LONG['de']} 2\n{'a ' * 5000}\n", encoding="utf-8")
    (tmp_path / "en-de.de").write_text(f"{LONG['en']} 1\n{LONG['en']} 2\nx\n", encoding="utf-8")
    (note,) = load_test_set("own", tmp_path, "en-de").notes
    assert note.startswith("1 times: has a side of more than 5,000 characters")
    assert "2 times: of the sampled ones: the source is in the target's language" in note
