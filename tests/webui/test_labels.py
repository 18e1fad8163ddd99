from __future__ import annotations

import pytest

from llamafactory_sekd.presets import PRESETS, Preset
from llamafactory_sekd.webui import page
from llamafactory_sekd.webui.page import LANGUAGES, alert, element_labels, objective_choices, words


def test_every_element_has_the_same_properties_in_every_language():
    for name, by_language in element_labels().items():
        assert set(by_language) == set(LANGUAGES), name
        assert len({frozenset(properties) for properties in by_language.values()}) == 1, name


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_objective_has_a_line_of_explanation_in_words(language):
    assert set(page._texts(language)["objectives"]) == set(PRESETS)
    assert [value for _, value in objective_choices(language)] == list(PRESETS)
    assert all(text.startswith(f"{value}: ") for text, value in objective_choices(language))


def test_an_objective_without_words_is_shown_with_its_formula(monkeypatch):
    monkeypatch.setitem(PRESETS, "new", Preset("(1-λ) x", frozenset(), "", {}))
    assert objective_choices("zh")[-1] == ("new: (1-λ) x", "new")


@pytest.mark.parametrize("section", ["alerts", "words"])
def test_messages_and_words_exist_in_every_language(section):
    assert len({frozenset(page._texts(language)[section]) for language in LANGUAGES}) == 1


def test_an_unknown_language_reads_english():
    assert words(None) == words("en")
    assert alert("no_teacher", None) == alert("no_teacher", "en")


def test_no_help_holds_what_the_page_would_take_for_markup():
    for name, by_language in element_labels().items():
        for properties in by_language.values():
            text = str(properties.get("info", ""))
            assert "<" not in text, name
            assert text.count("~") < 2, name  # a pair strikes out what is between


def test_labels_do_not_shadow_the_hosts():
    # The host's literal holds ours as well by now; the ledger keeps what was there before.
    import torch  # noqa: F401
    from llamafactory.webui import locales

    from llamafactory_sekd.host import ledger

    original = ledger.original("llamafactory.webui.locales.LOCALES")
    assert not set(original) & set(element_labels())
    assert set(locales.LOCALES) == set(original) | set(element_labels())
    assert {language for entry in original.values() for language in entry} == set(LANGUAGES)
