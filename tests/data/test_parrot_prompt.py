"""The Parrot prompt and the language codes."""

from __future__ import annotations

import pytest

from llamafactory_sekd.data.languages import Direction, parse_direction
from llamafactory_sekd.data.parrot import prompt, record, user_message
from llamafactory_sekd.errors import DataError


# Written out from the design, not put together from the code's own pieces.
EXPECTED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nTranslate the following sentences from "
    "English to German.\n\n### Input:\nGood morning!\n\n### Response:"
)


def test_prompt_is_parrots_character_for_character() -> None:
    assert prompt("Good morning!", Direction("en", "de")) == EXPECTED


def test_record_joined_as_the_host_joins_it_is_the_users_message() -> None:
    made = record("Good morning!", "Guten Morgen!", Direction("en", "de"))

    assert list(made) == ["instruction", "input", "output"]
    assert made["instruction"] + "\n" + made["input"] == user_message("Good morning!", Direction("en", "de"))
    assert made["output"] == "Guten Morgen!"


def test_direction_is_read_and_written_in_one_form() -> None:
    direction = parse_direction("zh-en")

    assert (direction.source, direction.target, str(direction), direction.slug) == ("zh", "en", "zh-en", "zh_en")
    assert direction.reversed == Direction("en", "zh")


@pytest.mark.parametrize("text", ["ende", "en-", "en-en", "en_de", "en-de-cs", "EN-DE", "", "../en-de"])
def test_direction_of_another_form_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(DataError, match=r"Unknown direction '.*': write source-target .* such as en-de"):
        parse_direction(text)


def test_unknown_language_is_named() -> None:
    with pytest.raises(DataError, match="Unknown direction 'en-xx': the language code 'xx' is not known"):
        parse_direction("en-xx")
