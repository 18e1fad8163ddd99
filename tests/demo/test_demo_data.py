"""The demo's data: which pairs are taken out of the wheel, and how they are split."""

from __future__ import annotations

import random
import re

import pytest
from helpers.fake_wheel import save_wheel

from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.demo import data
from llamafactory_sekd.errors import DataError


def numbered_pairs(count: int) -> list[tuple[str, str]]:
    return [(f"Turn on lamp {number}", f"Lampe {number} einschalten") for number in range(count)]


def test_only_plain_pairs_of_three_to_twelve_words_are_taken(tmp_path):
    english = {
        "title": "Set the time",
        "config": {
            "short": "Two words",
            "long": " ".join(["word"] * 13),
            "twelve": " ".join(["word"] * 12),
            "placeholder": "The {name} is on",
            "reference": "See [%key:common::on%] for more",
            "markup": "This is *very* important",
            "tag": "A<br>new line here",
            "url": "See https://example.org for more",
            "www": "See www.example.org for more",
            "break": "One line\nand another one",
            "no-break": "A hard\u00a0space is not plain",
            "entity": "Salt &amp; pepper here",
            "same": "Home Assistant Green",
            "untranslated": "Only in English here",
            "number": 7,
        },
    }
    german = {
        "title": "Uhrzeit einstellen",
        "config": {key: f"Text zu {key}" for key in english["config"] if key not in ("same", "untranslated")},
    }
    german["config"]["same"] = "Home Assistant Green"
    german["extra"] = "Nur auf Deutsch"
    wheel = save_wheel(tmp_path, {"clock": (english, german), "lamp": ({"a": "Only English in it"}, None)})

    assert data.read_pairs(wheel) == [
        ("Set the time", "Uhrzeit einstellen"),
        ("word " * 11 + "word", "Text zu twelve"),
    ]


def test_each_string_is_taken_once_and_the_frequent_translation_wins(tmp_path):
    components = {
        "a": ({"x": "Turn it on", "y": "Switch it on"}, {"x": "Anschalten", "y": "Einschalten"}),
        "b": ({"x": "Turn it on"}, {"x": "Einschalten"}),
        "c": ({"x": "Turn it on"}, {"x": "Einschalten"}),
    }
    reversed_order = dict(reversed(components.items()))

    pairs = data.read_pairs(save_wheel(tmp_path / "1", components))

    assert pairs == [("Turn it on", "Einschalten")]  # so "Switch it on" has no German string left
    assert data.read_pairs(save_wheel(tmp_path / "2", reversed_order)) == pairs


def test_the_split_is_disjoint_whole_and_the_same_each_time():
    pairs = numbered_pairs(50)

    split = data.split_pairs(pairs, test_size=10, valid_size=5)

    assert (len(split.train), len(split.valid), len(split.test)) == (35, 5, 10)
    assert sorted(split.train + split.valid + split.test) == sorted(pairs)
    assert split == data.split_pairs(pairs, test_size=10, valid_size=5)
    assert split.test != pairs[:10]


def test_too_few_pairs_are_refused():
    with pytest.raises(DataError, match=r"^15 pairs are too few: the demo holds out 15\.$"):
        data.split_pairs(numbered_pairs(15), test_size=10, valid_size=5)


def test_the_held_out_set_is_large_enough_for_its_purpose():
    assert data.TEST_SIZE >= 500
    assert data.VALID_SIZE > 0


def test_near_duplicates_are_those_of_the_definition():
    rng = random.Random(3)
    words = ["The", "the", "lamp", "is", "on", "off", "now", "in", "kitchen,", "Kitchen"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 8))) for _ in range(400)]
    held_out, training = texts[:60], texts[60:]

    def similarity(a: str, b: str) -> float:
        first, second = ({word.strip(",").lower() for word in text.split()} for text in (a, b))
        return len(first & second) / len(first | second)

    for threshold in (0.6, 0.75, 1.0):
        expected = [any(similarity(a, b) >= threshold for b in training) for a in held_out]
        assert data.near_duplicates(held_out, training, threshold) == expected
        assert len(set(expected)) == 2 or threshold == 0.6


def test_the_written_test_set_is_the_one_that_the_evaluation_reads(tmp_path):
    split = data.split_pairs(numbered_pairs(50), test_size=10, valid_size=5)

    data.write_data(split, tmp_path)

    loaded = load_test_set(data.TASK, tmp_path, str(data.DIRECTION))
    assert list(zip(loaded.sources, loaded.references, strict=True)) == split.test
    assert data.read_test_set(tmp_path) == (list(loaded.sources), list(loaded.references))


def test_another_file_in_the_wheels_place_is_refused(tmp_path):
    save_wheel(tmp_path, {})
    with pytest.raises(
        DataError, match=r"\.whl is not homeassistant==2026\.11\.0 as published \(its SHA-256 differs\)"
    ):
        data.find_wheel(tmp_path)
    with pytest.raises(DataError, match=r"nowhere holds no homeassistant-.*\.whl: fetch it there with `pip download"):
        data.find_wheel(tmp_path / "nowhere")


def test_without_a_network_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setattr(data, "PIP_OPTIONS", ("--retries", "0", "--timeout", "1"))
    with pytest.raises(DataError) as caught:
        data.fetch_wheel(tmp_path)

    assert re.fullmatch(
        r"homeassistant==2026\.11\.0 cannot be downloaded \(.+\): check the network, or run `pip download .+` where "
        r"there is one and pass the folder with --offline\.",
        str(caught.value),
    )
    assert list(tmp_path.iterdir()) == []
