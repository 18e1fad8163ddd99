"""The demo's data: which pairs are taken out of the wheel, and how they are split."""

from __future__ import annotations

import itertools
import json
import re
from zipfile import ZipFile

import pytest
from helpers.fake_wheel import save_wheel

from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.demo import data
from llamafactory_sekd.errors import DataError


def unlike_pairs(count: int) -> list[tuple[str, str]]:
    """Pairs of which no two are near-duplicates."""
    return [(f"red{n} blue{n} green{n} white{n}", f"rot{n} blau{n} grün{n} weiß{n}") for n in range(count)]


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


def test_the_split_is_disjoint_complete_and_the_same_each_time():
    pairs = unlike_pairs(50)

    split = data.split_pairs(pairs, test_size=10, valid_size=5, student_size=20)

    assert [len(part) for part in (split.test, split.valid, split.student, split.teacher)] == [10, 5, 20, 15]
    assert sorted(split.teacher + split.student + split.valid + split.test) == sorted(pairs)
    assert split == data.split_pairs(pairs, test_size=10, valid_size=5, student_size=20)
    assert split.test != pairs[:10]


def test_no_part_holds_a_near_duplicate_of_another_part():
    pairs = unlike_pairs(40)
    pairs += [(f"{source} too", f"{target} auch") for source, target in pairs]  # four of five words

    split = data.split_pairs(pairs, test_size=10, valid_size=5, student_size=20)

    parts = [{source.removesuffix(" too") for source, _ in part} for part in vars(split).values()]
    assert all(first.isdisjoint(second) for first, second in itertools.combinations(parts, 2))
    assert len(parts[-1]) == len(split.test) == 10  # of a cluster one string is held out, and the others are dropped


def test_too_few_pairs_are_refused():
    with pytest.raises(DataError, match=r"^15 pairs are too few: the demo holds out or gives to the student 35\.$"):
        data.split_pairs(unlike_pairs(15), test_size=10, valid_size=5, student_size=20)


def test_the_held_out_set_is_large_enough_for_its_purpose():
    assert data.TEST_SIZE >= 1000
    assert data.VALID_SIZE > 0


def test_the_test_set_is_clean_and_the_one_that_the_evaluation_reads_and_the_noise_is_written_down(tmp_path):
    split = data.split_pairs(unlike_pairs(60), test_size=10, valid_size=5, student_size=30)

    data.write_data(split, ["Nobody translated this"], tmp_path)

    loaded = load_test_set(data.TASK, tmp_path, str(data.DIRECTION))
    assert list(zip(loaded.sources, loaded.references, strict=True)) == split.test
    assert data.read_test_set(tmp_path) == (list(loaded.sources), list(loaded.references))
    noise = json.loads((tmp_path / data.NOISE_FILE).read_text())
    written = {
        name: [(one["input"], one["output"]) for one in json.loads((tmp_path / f"{name}.json").read_text())]
        for name in (data.TEACHER, data.TRAIN, data.VALID)
    }
    assert written[data.TEACHER] == split.teacher
    assert written[data.VALID] == split.valid
    differing = [
        i for i, (is_now, was) in enumerate(zip(written[data.TRAIN], split.student, strict=True)) if is_now != was
    ]
    assert differing == noise["wrong"]
    assert len(differing) == round(data.NOISE_SHARE * 30)


def test_the_monolingual_text_is_the_students_sources_and_strings_without_a_pair_that_resemble_nothing_held_out(
    tmp_path,
):
    english = {str(n): source for n, (source, _) in enumerate(unlike_pairs(50))}
    german = {str(n): target for n, (_, target) in enumerate(unlike_pairs(50))}
    pairs = data.read_pairs(save_wheel(tmp_path / "1", {"lamp": (english, german)}))
    split = data.split_pairs(pairs, test_size=10, valid_size=5, student_size=20)
    near = f"{split.test[0][0]} too"
    alone = {"a": "Nobody translated this", "b": near, "c": "Too short", "d": "The {name} is on"}

    wheel = save_wheel(tmp_path / "2", {"lamp": (english, german), "clock": (alone, None)})

    assert data.read_pairs(wheel) == pairs
    sources = data.read_sources(wheel, pairs)
    assert sources == sorted([near, "Nobody translated this"])
    text = data.monolingual_text(split, sources)
    assert text == [*(source for source, _ in split.student), "Nobody translated this"]


def test_translations_into_a_third_language_are_the_most_frequent_ones(tmp_path):
    wheel = save_wheel(tmp_path, {})
    with ZipFile(wheel, "a") as archive:
        for name, czech in (("a", "Zapnout"), ("b", "Zapnout"), ("c", "Zapni to")):
            for language, text in (("en", "Turn it on"), ("cs", czech)):
                archive.writestr(
                    f"homeassistant/components/{name}/translations/{language}.json", json.dumps({"x": text})
                )
    assert data.read_translations(wheel, "cs") == {"Turn it on": "Zapnout"}


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
