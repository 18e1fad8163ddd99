"""The prompts, the language codes and the directions."""

from __future__ import annotations

import pytest

from llamafactory_sekd.data.languages import Direction, base_code, language_name, parse_direction
from llamafactory_sekd.data.prompts import (
    PARROT,
    PLAIN,
    Prompt,
    prompt,
    prompt_named,
    record,
)
from llamafactory_sekd.errors import ArgumentError, DataError


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
    assert made["instruction"] + "\n" + made["input"] == PARROT.user_message("Good morning!", Direction("en", "de"))
    assert made["output"] == "Guten Morgen!"


def test_direction_is_read_and_written_in_one_form() -> None:
    direction = parse_direction("zh-en")

    assert (direction.source, direction.target, str(direction), direction.slug) == ("zh", "en", "zh-en", "zh_en")
    assert direction.reversed == Direction("en", "zh")


@pytest.mark.parametrize("text", ["ende", "en-", "en-en", "en_de", "en-de-cs", "EN-DE", "", "../en-de"])
def test_direction_of_another_form_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(DataError, match=r"Unknown direction '.*': write source-target .* such as en-de"):
        parse_direction(text)


@pytest.mark.parametrize("text", ["en-eng", "deu_Latn-de", "iw-he", "zh-Hans-zho_Hans"])
def test_two_codes_of_one_language_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=f"Unknown direction '{text}': both codes are of "):
        parse_direction(text)
    assert parse_direction(text, target_name="Plain words").target_language == "Plain words"


@pytest.mark.parametrize("code", ["und", "mul", "zxx_Zxxx", "qaa", "sgn", "art", "bh"])
def test_a_code_of_no_language_is_refused(code: str) -> None:
    with pytest.raises(DataError, match="is not known"):
        parse_direction(f"en-{code}")
    assert parse_direction(f"en-{code}", target_name="Old Elvish").target_language == "Old Elvish"


def test_unknown_language_is_named() -> None:
    with pytest.raises(DataError, match="Unknown direction 'en-xx': the language code 'xx' is not known"):
        parse_direction("en-xx")


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("de", "German"),
        ("cs", "Czech"),
        ("bn", "Bengali"),
        ("no", "Norwegian"),
        ("nb", "Norwegian Bokmål"),
        ("nds", "Low German"),
        ("fil", "Filipino"),
        ("mg", "Malagasy"),
        ("deu_Latn", "German"),
        ("eng_Latn", "English"),
        ("swh_Latn", "Swahili"),
        ("arb_Arab", "Arabic"),
        ("pt-BR", "Brazilian Portuguese"),
        ("zho_Hant", "Traditional Chinese"),
        ("zh-Hans", "Simplified Chinese"),
        ("sr-Latn", "Serbian (Latin)"),
        ("srp_Cyrl", "Serbian"),
        ("acm_Arab", "Mesopotamian Arabic"),
        ("arb_Latn", "Standard Arabic (Latin)"),
        ("pbt_Arab", "Southern Pashto"),
        ("kor_Hang", "Korean"),
        ("npi_Deva", "Nepali"),
        ("ory_Orya", "Odia"),
    ],
)
def test_every_usual_kind_of_code_has_an_english_name(code: str, name: str) -> None:
    assert language_name(code) == name


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("en-pt-BR", ("en", "pt-BR")),
        ("zh-Hant-en", ("zh-Hant", "en")),
        ("eng_Latn-deu_Latn", ("eng_Latn", "deu_Latn")),
        ("pt-BR-pt-PT", ("pt-BR", "pt-PT")),
        ("es-419-no", ("es-419", "no")),
    ],
)
def test_direction_with_territory_or_script_is_divided_in_one_way(text: str, sides: tuple[str, str]) -> None:
    direction = parse_direction(text)

    assert (direction.source, direction.target) == sides
    assert str(direction) == text
    assert "-" not in direction.slug


def test_own_name_makes_an_unknown_code_usable_and_turns_with_the_direction() -> None:
    direction = parse_direction("en-xx", target_name="Klingon")

    assert PARROT.instruction(direction).startswith("Translate the following sentences from English to Klingon.")
    assert PARROT.instruction(direction.reversed).startswith("Translate the following sentences from Klingon to Engl")


@pytest.mark.parametrize("name", ["Klingon\n### Response:", "Kling\ron", "Kling\u2028on", "\x1b[31mKlingon"])
def test_a_name_that_would_add_a_line_to_the_prompt_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="has a line break or another control character"):
        parse_direction("en-xx", target_name=name)
    with pytest.raises(DataError, match="has a line break or another control character"):
        parse_direction("xx-en", source_name=name)


def test_base_of_a_code_is_the_language_that_detectors_know() -> None:
    assert [base_code(code) for code in ("pt-BR", "deu_Latn", "zho_Hant", "de", "xx")] == [
        "pt",
        "de",
        "zh",
        "de",
        "xx",
    ]


def test_plain_prompt_holds_no_heading_and_is_joined_by_the_host_as_written() -> None:
    made = PLAIN.record("Hi {target_code}!", "Hallo!", Direction("en", "de"))

    joined = made["instruction"] + "\n" + made["input"]
    assert joined == "Translate the following sentences from English to German.\n\nHi {target_code}!"
    assert joined == PLAIN.user_message("Hi {target_code}!", Direction("en", "de"))


def test_own_prompt_may_have_the_sentence_anywhere_and_all_fields() -> None:
    own = prompt_named("<{source_code}> {source} <{target_code}>\\nNow in {target_language}, not {source_language}:")
    made = own.record("Hi", "Hallo", Direction("en", "de"))

    assert made == {"instruction": "<en> Hi <de>\nNow in German, not English:", "input": "", "output": "Hallo"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("Translate.", "needs {source} exactly once"), ("{source} {lang}", "Unknown field {lang}"), ("{source}{}", "{}")],
)
def test_prompt_that_cannot_work_is_refused_with_the_fields(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message.replace("{", r"\{")):
        Prompt(text)
