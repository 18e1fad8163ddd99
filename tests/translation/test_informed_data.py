"""``sekd data informed``: the teacher's records are the student's with more before the sentence, and leak nothing."""

from __future__ import annotations

import json

import pytest

from llamafactory_sekd.errors import ArgumentError, DataError
from llamafactory_sekd.host.data_command import informed
from llamafactory_sekd.translation.wider_prompts import Widening, write_informed


GERMAN = "Translate the following sentences from English to German.\n\n### Input:"
CZECH = "Translate the following sentences from English to Czech.\n\n### Input:"
PAIRS = [
    (GERMAN, "The dog sleeps.", "Der Hund schläft."),
    (CZECH, "The dog sleeps.", "Pes spí."),
    (GERMAN, "The dog eats.", "Der Hund frisst."),
    (GERMAN, "the  dog sleeps.", "Der Hund, er schläft."),
    (GERMAN, "A hound is asleep.", "der hund schläft."),
    (CZECH, "The cat sleeps.", "Kočka spí."),
    (GERMAN, "It rained.", "Es regnete."),
]


@pytest.fixture
def folder(tmp_path):
    records = [{"instruction": i, "input": s, "output": t, "id": n} for n, (i, s, t) in enumerate(PAIRS)]
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": {"file_name": "pairs.json"}}))
    return tmp_path


def made(folder, **keys):
    write_informed("pairs", folder, "wide", Widening(**keys), overwrite=True)
    return json.loads((folder / "wide.json").read_text())


def before(record, number):
    assert record["instruction"].endswith(PAIRS[number][0])
    return record["instruction"].removesuffix(PAIRS[number][0]).strip()


def test_order_sentences_and_responses_are_the_data_sets_and_the_entry_is_declared(folder):
    records = made(folder, previous=2, examples=2)
    kept = [{key: record[key] for key in ("input", "output", "id")} for record in records]
    assert kept == [{"input": s, "output": t, "id": n} for n, (_, s, t) in enumerate(PAIRS)]
    assert json.loads((folder / "dataset_info.json").read_text())["wide"] == {"file_name": "wide.json"}


def test_examples_are_the_nearest_of_the_same_direction_and_never_the_record_itself(folder):
    records = made(folder, examples=1)
    assert before(records[2], 2).startswith("The dog sleeps.\nDer Hund")
    # Neither its own text in other case or spacing, nor a sentence with its translation.
    assert before(records[0], 0) == "The dog eats.\nDer Hund frisst."
    assert before(records[4], 4) != "The dog sleeps.\nDer Hund schläft."
    assert before(records[1], 1) == "The cat sleeps.\nKočka spí."
    for number, record in enumerate(made(folder, examples=9)):
        shown = before(record, number).casefold().split("\n")
        assert PAIRS[number][2].casefold() not in shown
        assert not any("".join(line.split()) == "".join(PAIRS[number][1].casefold().split()) for line in shown)


def test_the_sentences_before_are_those_of_the_same_document_and_direction(folder):
    records = made(folder, previous=2)
    assert before(records[3], 3) == "The dog sleeps.\nThe dog eats."
    assert before(records[5], 5) == "The dog sleeps."
    assert before(records[0], 0) == ""

    names = folder / "names.txt"
    names.write_text("".join(f"{name}\n" for name in "aaabbbb"))
    write_informed("pairs", folder, "wide", Widening(previous=2), names, overwrite=True)
    records = json.loads((folder / "wide.json").read_text())
    assert [before(records[number], number) for number in (3, 4, 6)] == [
        "",
        "the  dog sleeps.",
        "the  dog sleeps.\nA hound is asleep.",
    ]


def test_a_second_run_verifies_and_what_cannot_work_is_one_line(folder, capsys):
    informed("pairs", folder, None, 1, 0, 2000, None, False)
    informed("pairs", folder, None, 1, 0, 2000, None, False)
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("Written: pairs_informed, 7 records.")
    assert second.startswith("Verified: pairs_informed, 7 records.")
    (folder / "short.txt").write_text("a\n")
    for error, words, keys in (
        (ArgumentError, "give --previous N, --examples N, or both", {"widening": Widening()}),
        (DataError, "created with different options", {"widening": Widening(previous=2)}),
        (DataError, "declares no data set 'none'", {"name": "none"}),
        (DataError, "has 1 lines and", {"documents": folder / "short.txt", "informed_name": "other"}),
    ):
        given = {
            "name": "pairs",
            "folder": folder,
            "informed_name": "pairs_informed",
            "widening": Widening(previous=1),
        }
        with pytest.raises(error, match=words) as caught:
            write_informed(**{**given, **keys})
        assert "\n" not in str(caught.value)


def test_a_record_whose_sentence_is_inside_its_instruction_is_refused_with_its_number(folder):
    (folder / "pairs.json").write_text(
        json.dumps([{"instruction": "Translate: A dog.", "input": "", "output": "Hund"}])
    )
    with pytest.raises(DataError, match=r"pairs.json:1: the sentence must be in 'input'"):
        write_informed("pairs", folder, "wide", Widening(previous=1))


def test_a_record_that_is_not_valid_unicode_is_refused_by_its_number(folder):
    records = json.loads((folder / "pairs.json").read_text())
    records[2]["output"] = "\ud83d"
    (folder / "pairs.json").write_text(json.dumps(records))
    with pytest.raises(DataError, match=r"pairs\.json:3: not valid UTF-8 .*: remove the record"):
        made(folder, previous=1)
