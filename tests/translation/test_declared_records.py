"""Conversations of `dataset_info.json` are translated as alpaca records with the same prompts and answers are."""

from __future__ import annotations

import json

import pytest

from llamafactory_sekd.errors import DataError
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
