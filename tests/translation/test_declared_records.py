"""Conversations of `dataset_info.json` are translated as alpaca records with the same prompts and answers are."""

from __future__ import annotations

import json

import pytest

from llamafactory_sekd.errors import DataError
from llamafactory_sekd.evaluation.systems import Translation
from llamafactory_sekd.translation.choosing import Choice, select
from llamafactory_sekd.translation.source_texts import read_dataset


PROMPT = "Translate the following sentences from English to German.\n\n{}"
PAIRS = [("The dog sleeps.", "Der Hund schläft."), ("It rains.", "Es regnet."), ("No answer yet.", "")]
OPENAI = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def save(folder, records, **entry):
    (folder / "talk.json").write_text(json.dumps(records))
    (folder / "dataset_info.json").write_text(json.dumps({"talk": {"file_name": "talk.json", **entry}}))


def turns(role, content, user, assistant):
    for source, target in PAIRS:
        found = [{role: user, content: PROMPT.format(source)}]
        yield found + ([{role: assistant, content: target}] if target else [])


@pytest.mark.parametrize(
    ("column", "entry"),
    [
        ("conversations", {"formatting": "sharegpt"}),
        ("messages", {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": OPENAI}),
        ("messages", {"formatting": "openai", "columns": {"messages": "messages"}, "tags": OPENAI}),
    ],
    ids=["sharegpt", "messages", "openai"],
)
def test_conversations_are_read_as_alpaca_records_are(tmp_path, column, entry):
    save(tmp_path, [{"instruction": PROMPT.format(source), "input": "", "output": target} for source, target in PAIRS])
    expected = read_dataset("talk", tmp_path, None)
    tags = tuple(entry["tags"].values()) if "tags" in entry else ("from", "value", "human", "gpt")
    save(tmp_path, [{column: found} for found in turns(*tags)], **entry)
    texts = read_dataset("talk", tmp_path, None)
    assert texts.sentences == expected.sentences
    assert [str(sentence.direction) for sentence in texts.sentences] == ["en-de"] * 3
    assert [sentence.reference for sentence in texts.sentences] == ["Der Hund schläft.", "Es regnet.", None]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"conversations": [{"from": "system", "value": "x"}, {"from": "human", "value": "y"}]}, "has system, human"),
        (
            {"conversations": [{"from": who, "value": "x"} for who in ("human", "gpt", "human", "gpt")]},
            "human, gpt, hu",
        ),
        ({"conversations": []}, "has no turn"),
        ({"text": "x"}, r"expected a record with 'conversations'"),
        (["x"], r"expected a record with 'conversations'"),
    ],
    ids=["system", "two turns", "empty", "no column", "list"],
)
def test_what_is_no_question_with_its_answer_is_refused_with_its_place(tmp_path, record, words):
    save(tmp_path, [record], formatting="sharegpt")
    with pytest.raises(DataError, match=rf"talk.json:1: .*{words}") as caught:
        read_dataset("talk", tmp_path, None)
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_passed_on_and_unknown_formats_are_refused(tmp_path):
    for entry, words in (
        ({"columns": {"system": "system"}}, "a column for 'system'"),
        ({"formatting": "csv"}, "`formatting: csv` is not one"),
        ({"file_name": None, "hf_hub_url": "x/y"}, "is not in a file"),
    ):
        save(tmp_path, [], **entry)
        with pytest.raises(DataError, match=words):
            read_dataset("talk", tmp_path, None)


@pytest.mark.parametrize(
    ("records", "entry", "words"),
    [
        ([{"instruction": 5, "input": "b"}], {}, r"talk\.json:1: expected texts, got \[5, 'b', ''\]"),
        ([{"instruction": "a"}], {"columns": "prompt"}, "`columns` and `tags` .* must be mappings"),
    ],
)
def test_records_and_entries_of_another_kind_are_one_line(tmp_path, records, entry, words):
    save(tmp_path, records, **entry)
    with pytest.raises(DataError, match=words):
        read_dataset("talk", tmp_path, None)


def test_a_misspelled_data_set_is_answered_with_the_one_that_was_meant(tmp_path):
    save(tmp_path, [])
    with pytest.raises(DataError, match=r"declares no data set 'tallk': did you mean 'talk'"):
        read_dataset("tallk", tmp_path, None)


def test_sentences_whose_language_cannot_be_judged_are_counted(tmp_path, caplog):
    records = [{"instruction": PROMPT.format("Go."), "input": ""}, {"instruction": "Tell me a joke.", "input": ""}]
    save(tmp_path, records)
    sentences = read_dataset("talk", tmp_path, None).sentences
    made = [[Translation("x", 0, hit_limit=False)] for _ in sentences]
    choice = Choice(n_best=1, consensus=None, closest=False)
    with caplog.at_level("WARNING"):
        select(sentences, made, choice, ["language"], None, tmp_path)
        select(read_dataset("talk", tmp_path, "yo").sentences, made, choice, ["language"], None, tmp_path)
    assert "does not judge 1 of 2 sentences, of no known target language" in caplog.text
    assert "does not know yo: it finds text in another script alone" in caplog.text
