"""Bad lines are found where they are, and nothing is dropped without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_sekd.data import checks
from llamafactory_sekd.data.checks import Block, Findings, Pair, Problem, clean_pairs
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.readers import json_pairs, read_lines, read_text_pairs, tsv_pairs
from llamafactory_sekd.errors import DataError


DE_EN = Direction("de", "en")


def _found(pairs: list[Pair]) -> tuple[list[Pair], list[tuple[str, int]]]:
    findings = Findings()
    kept = clean_pairs(pairs, findings)
    return kept, [(problem.key, line) for problem, _, line in findings.items]


def test_every_bad_line_is_reported_with_its_number_and_the_rest_is_kept(tmp_path: Path) -> None:
    source, target = tmp_path / "a.en", tmp_path / "a.de"
    source.write_bytes(b"one\n\n \t\nfour\nf\xfcnf\nsix\nseven\xef\xbf\xbd\n eight \n\xe2\x80\x8b\nlast")
    target.write_bytes("eins\n\ndrei\n\nfünf\nsix\nsieben\nacht\nneun\nletzter".encode())

    kept, found = _found(read_text_pairs(source, target))

    assert found == [
        ("blank", 2),
        ("empty_side", 3),
        ("empty_side", 4),
        ("wrong_encoding", 5),
        ("identical_sides", 6),
        ("replacement_character", 7),
        ("outer_space", 8),
        ("empty_side", 9),
    ]
    assert [(pair.line, pair.source, pair.target) for pair in kept] == [
        (1, "one", "eins"),
        (6, "six", "six"),
        (7, "seven\ufffd", "sieben"),
        (8, "eight", "acht"),
        (10, "last", "letzter"),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_line_break_inside_a_sentence_becomes_one_space_and_is_reported(end: str) -> None:
    kept, found = _found([Pair(f"a{end}b", "c", "f", 7)])

    assert found == [("line_break", 7)]
    assert kept[0].source == "a b"


def test_lines_end_only_at_newlines_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("\ufeffeins\r\nzwei\u2028drei\x0bvier\n\nsechs\n".encode())

    assert read_lines(path) == ["eins", "zwei\u2028drei\x0bvier", "", "sechs"]


def test_broken_escape_in_json_counts_as_wrong_encoding(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(
        '{"translation": {"de": "kaputt \\ud83d", "en": "broken"}}\n{"translation": {"de": "a", "en": "b"}}'
    )

    assert _found(list(json_pairs(path, DE_EN)))[1] == [("wrong_encoding", 1)]


def test_json_lines_and_json_list_give_the_same_pairs_in_either_direction(tmp_path: Path) -> None:
    records = [{"translation": {"de": f"d{i}", "en": f"e{i}"}} for i in range(3)]
    lines, array = tmp_path / "lines.json", tmp_path / "list.json"
    lines.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    array.write_text("  " + json.dumps(records, indent=1))

    expected = [("e0", "d0", 1), ("e1", "d1", 2), ("e2", "d2", 3)]
    for path in (lines, array):
        pairs = list(json_pairs(path, DE_EN.reversed))
        assert [(pair.source, pair.target, pair.line) for pair in pairs] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"translation": {"de": "a", "en": "b"}}\n{"translation": {"de": "a"}}',
            r"x\.json:2: expected .*\"de\": text",
        ),
        ('{"translation": {"de": "a", "en": "b"}}\n{"trans', r"x\.json:2: not valid JSON"),
        ('[{"translation": {"de": "a", "en": null}}]', r"x\.json:1: expected"),
        ("[[1, 2]]", r"x\.json:1: expected"),
        ("[]", r"x\.json holds no sentences"),
        ("", r"x\.json holds no sentences"),
    ],
)
def test_malformed_json_stops_with_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        list(json_pairs(path, DE_EN))


def test_misaligned_files_stop_with_both_counts(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1\n2\n3\n")
    (tmp_path / "b").write_text("1\n2\n")
    with pytest.raises(DataError, match=r"Misaligned files: .*a has 3 lines and .*b has 2"):
        read_text_pairs(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(("line", "columns"), [("only one", 1), ("a\tb\tc", 3)])
def test_tsv_with_other_columns_stops_with_the_line(tmp_path: Path, line: str, columns: int) -> None:
    path = tmp_path / "x.tsv"
    path.write_text(f"a\tb\n\n{line}\n")
    with pytest.raises(DataError, match=rf"x\.tsv:3: {columns} columns? instead of 2"):
        list(tsv_pairs(path))


def test_tsv_gives_its_two_columns_and_reports_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("a\tb\n\n\tc\nd\te\n")

    kept, found = _found(list(tsv_pairs(path)))

    assert found == [("blank", 2), ("empty_side", 3)]
    assert [(pair.source, pair.target) for pair in kept] == [("a", "b"), ("d", "e")]


def test_utf16_and_missing_files_are_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hallo", encoding="utf-16")
    with pytest.raises(DataError, match=r"x is UTF-16: convert it .*iconv -f UTF-16 -t UTF-8"):
        read_lines(tmp_path / "x")
    with pytest.raises(DataError, match=r"Cannot read .*nowhere: No such file"):
        read_lines(tmp_path / "nowhere")


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), max_size=8))
def test_cleaned_sentences_survive_one_line_per_sentence_in_any_tool(texts: list[tuple[str, str]]) -> None:
    pairs = [Pair(source, target, "f", number) for number, (source, target) in enumerate(texts, start=1)]
    findings = Findings()
    kept = clean_pairs(pairs, findings)

    left_out = {line for problem, _, line in findings.items if problem.outcome.value == "left out"}
    assert [pair.line for pair in kept] == [number for number in range(1, len(pairs) + 1) if number not in left_out]
    for pair in kept:
        assert pair.source.splitlines() == [pair.source] == [pair.source.strip()]
        assert pair.target.encode("utf-8").decode("utf-8").splitlines() == [pair.target]
    for pair in kept:  # what changed was said
        before = texts[pair.line - 1]
        assert (pair.source, pair.target) == before or any(line == pair.line for _, _, line in findings.items)


def test_findings_list_every_line_for_the_manifest() -> None:
    findings = Findings()
    for line in (3, 9):
        findings.add(Problem.EMPTY_SIDE, Pair("", "x", "train.en", line))

    assert findings.as_json() == [
        {
            "problem": "empty_side",
            "words": "one side is empty",
            "outcome": "left out",
            "file": "train.en",
            "count": 2,
            "lines": [3, 9],
        }
    ]


def test_the_quick_look_at_many_pairs_finds_what_a_look_at_each_finds() -> None:
    every = [chr(code) for code in (*range(0x10000), 0x110BD, 0x1F600, 0xE0001)]
    of_all_kinds = [*every[:0x3100], *every[0xD7F0:0xE010], *every[0xF8F0:]]
    texts = [f"a{c}b" for c in every] + [text for c in of_all_kinds for text in (f"{c}a", f"a{c}", c)]
    texts += ["a\u00c3\u00a4b", "a\u00e2\u20acb", "a<b>c", "a&amp;b", "", "a", "a" * 2500, "a" * 5000, "b" * 6000]
    pairs = [Pair(*("a", text)[:: (1, -1)[line % 2]], "f", line) for line, text in enumerate(texts)]
    quick, each = Findings(), Findings()
    expected = [cleaned for pair in pairs if (cleaned := checks._clean_pair(pair, each)) is not None]
    block = checks.clean_block(Block.of(pairs), quick)
    assert list(block) == expected
    assert quick == each
    assert sum(each.counts.values()) > 8500
    again = Findings()
    assert clean_pairs(pairs, again) == expected
    assert again == each
