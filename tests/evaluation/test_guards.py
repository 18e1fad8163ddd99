"""The guards find what they are for and leave good translations alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.sentences import ENGLISH, GERMAN

from llamafactory_sekd.data.languages import is_other_language
from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.evaluation.guards import has_extra_text, has_loop, inspect


LONG = {
    "cs": "Po bouři leželo na silnici mnoho stromů a hasiči pracovali celou noc.",
    "de": "Nach dem Sturm lagen viele Bäume auf der Straße, und die Feuerwehr arbeitete die ganze Nacht.",
    "en": "After the storm, many trees lay across the road and the fire brigade worked through the night.",
    "is": "Eftir storminn lágu mörg tré yfir veginn og slökkviliðið vann alla nóttina.",
    "ru": "После бури на дороге лежало много деревьев, и пожарные работали всю ночь.",
    "zh": "暴风雨过后，许多树木横在路上，消防队工作了一整夜。",
}


@pytest.mark.parametrize("language", LONG)
def test_every_language_of_alma_is_told_from_the_others(language: str) -> None:
    assert [other for other in LONG if is_other_language(LONG[other], language)] == [
        other for other in LONG if other != language
    ]


@pytest.mark.parametrize(("code", "language"), [("deu_Latn", "de"), ("zh-Hant", "zh"), ("en-GB", "en")])
def test_the_language_is_judged_whatever_kind_of_code_names_it(code: str, language: str) -> None:
    found = inspect([LONG[language], LONG["is"]], code, None, 1.0)
    assert found.wrong_language == 0.5


@pytest.mark.parametrize("line", ["", "No.", "OK", "2022", "Anna Müller"])
def test_a_line_too_short_to_judge_is_not_judged(line: str) -> None:
    assert not is_other_language(line, "cs")


@pytest.mark.parametrize(
    "line",
    [
        "the the the the",
        "Er ging nach Hause und er ging nach Hause und er ging nach Hause und er ging nach Hause und",
        "Das ist " + "sehr, sehr " * 5,
        "房子在河边" * 6,
        "blabla" * 8,
        "," * 40,
        "1 " * 20,
        "0.5 " * 20,
        "- " * 20,
        "der Mann, der mit seinem Hund und dem Kind seiner Schwester am Abend durch den Park ging, " * 20,
        "嵐のあと、道にはたくさんの木が倒れていて、消防隊は一晩中働いた。" * 6,
    ],
)
def test_a_repeated_phrase_is_a_loop(line: str) -> None:
    assert has_loop(line)


@pytest.mark.parametrize(
    "line",
    ["", "no no no", "Ha ha ha!", "哈哈哈哈", "-" * 80, "1 000 000 000 000 000 000", "zzzz", "3 3 3 3 3 3"],
)
def test_emphasis_figures_and_rulers_are_no_loops(line: str) -> None:
    assert not has_loop(line)


SOURCE, GOOD = LONG["en"], LONG["de"]


@pytest.mark.parametrize(
    "line",
    [
        f"### Response: {GOOD}",
        f"{GOOD} <|im_end|>",
        f"Here is the translation: {GOOD}",
        f"Hier ist die Übersetzung: {GOOD}",
        f"Zde je překlad: {GOOD}",
        f"**Translation:** {GOOD}",
        f"翻译：{GOOD}",
        f"German: {GOOD}",
        f"Deutsch: „{GOOD}“",
        f"Answer: {GOOD}",
        f"Sure! {GOOD}",
        f"Sure, here you go: {GOOD}",
        f"{GOOD} (Note: I kept the tone of the original.)",
        f"{GOOD} Anmerkung: frei übersetzt",
        f"{SOURCE} {GOOD}",
        f"{SOURCE} → {GOOD}",
        f'"{GOOD}"',
        f"„{GOOD}“",
    ],
)
def test_text_that_is_no_translation_is_found(line: str) -> None:
    assert has_extra_text(line, SOURCE)
    assert inspect([line, GOOD], "de", None, 1.0, [SOURCE, SOURCE]).extra_text == 0.5


@pytest.mark.parametrize(
    ("line", "source"),
    [
        (GOOD, SOURCE),
        ("„Es regnet“, sagte er.", "It rains, he said."),
        ("„Es regnet.“", 'It rains."'),
        ("Er sagte: „Es regnet.“", 'He said, "It rains."'),
        (
            "Of course, working late can be dangerous: most are out of work.",
            "Natürlich kann das riskant sein: viele …",
        ),
        ("Sure, it could have gone better than the 0:2.", "Gut, ein 0 zu 2 war zu wenig."),
        ("Übersetzung: Anna Müller", "Translation: Anna Müller"),
        ("Siehe A -> B.", "See A -> B."),
        ("University of California, Los Angeles", "University of California, Los Angeles"),
    ],
)
def test_a_translation_with_colons_and_quotations_is_no_extra_text(line: str, source: str) -> None:
    assert not has_extra_text(line, source)


@pytest.mark.parametrize("task", ["wmt22", "wmt21_valid"])
@pytest.mark.parametrize("direction", ["en-de", "de-en", "en-cs", "cs-en"])
def test_references_have_no_extra_text(alma_dir: Path, task: str, direction: str) -> None:
    test_set = load_test_set(task, alma_dir, direction)
    found = sum(map(has_extra_text, test_set.references, test_set.sources))
    assert found <= 0.003 * len(test_set.sources)


SPOKEN_AS_ONE = {
    "da": "Efter stormen lå der mange træer på vejen, og brandvæsenet arbejdede hele natten.",
    "no": "Etter stormen lå det mange trær på veien, og brannvesenet arbeidet hele natten.",
    "hr": "Nakon oluje na cesti je ležalo mnogo stabala, a vatrogasci su radili cijelu noć.",
    "sr": "Posle oluje na putu je ležalo mnogo stabala, a vatrogasci su radili celu noć.",
    "id": "Setelah badai, banyak pohon tergeletak di jalan dan pemadam kebakaran bekerja sepanjang malam.",
    "ms": "Selepas ribut, banyak pokok tumbang di jalan raya dan bomba bekerja sepanjang malam.",
    "sk": "Po búrke ležalo na ceste veľa stromov a hasiči pracovali celú noc.",
    "cs": LONG["cs"],
}


@pytest.mark.parametrize(("one", "other"), [("da", "no"), ("hr", "sr"), ("id", "ms"), ("sk", "cs")])
def test_languages_that_are_taken_for_each_other_count_as_one_and_english_is_still_found(one: str, other: str) -> None:
    for language in (one, other):
        assert not is_other_language(SPOKEN_AS_ONE[one], language)
        assert not is_other_language(SPOKEN_AS_ONE[other], language)
        assert is_other_language(LONG["en"], language)


CYRILLIC = "После олује на путу је лежало много стабала, а ватрогасци су радили целу ноћ."
YORUBA = "Lẹ́yìn ìjì náà, ọ̀pọ̀lọpọ̀ igi ni ó wà lójú ọ̀nà, àwọn panápaná sì ṣiṣẹ́ ní gbogbo òru."


@pytest.mark.parametrize(
    ("line", "code", "is_other"),
    [
        (SPOKEN_AS_ONE["sr"], "sr-Latn", False),
        (CYRILLIC, "sr-Latn", True),
        (CYRILLIC, "sr_Cyrl", False),
        (SPOKEN_AS_ONE["sr"], "srp_Cyrl", True),
        (SPOKEN_AS_ONE["sr"], "sr", False),
        (CYRILLIC, "sr", False),
        (LONG["en"], "sr-Latn", True),
        (LONG["en"], "zh-Hant", True),
        (YORUBA, "yo", False),  # which the identifier does not know
        (LONG["en"], "yo", False),
        (LONG["ru"], "yo", True),
        (LONG["de"], "deu_Latn", False),
        (
            "Pagkatapos ng bagyo, maraming puno ang nakahiga sa kalsada at magdamag na nagtrabaho ang mga bumbero.",
            "fil",
            False,
        ),
        (LONG["en"], "tgl", True),
        (LONG["en"], "en-US", False),
        (LONG["de"], "pt_BR", True),
    ],
)
def test_another_script_is_another_language_and_what_is_not_known_is_not_judged(line, code, is_other) -> None:
    assert is_other_language(line, code) == is_other


def test_shares_are_of_all_sentences() -> None:
    lines = ["", *GERMAN[1:5], *ENGLISH[5:9], "und so weiter " * 5]
    guards = inspect(lines, "de", [False] * 9 + [True], length_ratio=1.1)
    assert guards.empty == 0.1
    # "It rains." is too short to judge.
    assert guards.wrong_language == 0.3
    assert guards.repetition == 0.1
    assert guards.hit_max_new_tokens == 0.1
    assert guards.length_ratio == 1.1


def test_what_cannot_be_known_is_none() -> None:
    guards = inspect(["dunno"], "ha", None, length_ratio=1.0)
    assert guards.wrong_language is None
    assert guards.hit_max_new_tokens is None


@pytest.mark.parametrize("direction", ["en-de", "de-en", "en-cs"])
def test_references_of_wmt22_pass_and_untranslated_sources_do_not(alma_dir: Path, direction: str) -> None:
    test_set = load_test_set("wmt22", alma_dir, direction)
    target = test_set.direction.target
    references = inspect(test_set.references[::10], target, None, 1.0)
    assert references.wrong_language is not None
    assert references.wrong_language <= 0.015
    assert references.repetition == references.empty == 0
    sources = inspect(test_set.sources[::10], target, None, 1.0)
    assert sources.wrong_language is not None
    assert sources.wrong_language > 0.85
