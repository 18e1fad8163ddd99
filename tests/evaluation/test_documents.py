"""Documents are translated together, aligned by line, and sentence by sentence where that does not fit."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.sentences import ENGLISH, GERMAN, write_lines

from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.data.testsets import TestSet, load_test_set
from llamafactory_sekd.errors import DataError, EvaluationError
from llamafactory_sekd.evaluation.evaluation_run import Asked, translate_pending
from llamafactory_sekd.evaluation.evaluation_settings import Settings, parse_settings
from llamafactory_sekd.evaluation.systems import (
    BatchLimits,
    Request,
    Translation,
    Translator,
    documents_in,
    documents_of,
    requests_of,
)
from llamafactory_sekd.evaluation.translation_store import Hypotheses, Store, aligned
from llamafactory_sekd.host.evaluate import evaluate_settings
from llamafactory_sekd.ranks import Ranks


EN_DE = parse_direction("en-de")
NAMES = ["a", "a", "a", "b", "c", "c", "c", "c", "", ""]


@pytest.fixture
def documents_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    write_lines(folder / "en-de.en", ENGLISH)
    write_lines(folder / "en-de.de", GERMAN)
    write_lines(folder / "en-de.docid", NAMES)
    return folder


def settings(config: dict[str, Any], folder: Path, **changes: Any) -> Settings:
    keys = {**config, "task": "documents", "task_dir": str(folder.parent), "directions": ["en-de"], **changes}
    return parse_settings(keys, "eval.yaml")


class Broken(Exception):
    """A run that ends in between."""


def shouting(breaks_after: int | None = None, bad: Sequence[str] = ()) -> Translator:
    """A model that says every line in capitals after a thought; a line of ``bad`` becomes two, if it is not alone."""
    texts: list[str] = []

    def encode(request: Request) -> list[int]:
        texts.append(request.message.rpartition("### Input:\n")[2])
        return [len(texts) - 1] * len(texts[-1])

    def translate(prompts: Sequence[list[int]], limits: BatchLimits) -> Iterator[list[tuple[int, Translation]]]:
        for count, (index, prompt) in enumerate(enumerate(prompts)):
            if count == breaks_after:
                raise Broken
            lines = texts[prompt[0]].split("\n")
            said = [line.upper() + ("\n…" if line in bad and len(lines) > 1 else "") for line in lines]
            yield [(index, Translation("<think> Hm.\nSo </think>" + "\n\n".join(said), len(prompt), False))]

    return Translator(encode, translate)


def run(keys: Settings, test_set: TestSet, folder: Path, *translators: Translator) -> Hypotheses:
    system = keys.systems[0]
    task_dir = keys.task_dir
    asked = Asked(requests_of(system, EN_DE, test_set, task_dir), documents_of(system, EN_DE, test_set, task_dir))
    store = Store(folder, "en-de", len(asked.requests))
    for translator in translators:
        try:
            translate_pending(translator, asked, store.resume("f"), store, "f", keys, Ranks(0, 1), "one en-de")
        except Broken:
            continue
    return store.finish("f", 1)


def test_a_document_is_made_of_neighbors_with_one_name_or_of_pieces_of_them() -> None:
    assert documents_in(NAMES) == [(0, 1, 2), (3,), (4, 5, 6, 7), (8,), (9,)]
    assert documents_in(NAMES, 2) == [(0, 1), (2,), (3,), (4, 5), (6, 7), (8,), (9,)]
    assert documents_in(["a", "b", "a"]) == [(0,), (1,), (2,)]
    assert documents_in([]) == []


def test_lines_are_aligned_where_their_number_fits() -> None:
    assert aligned("Eins\n\n  Zwei \n", 2) == ["Eins", "Zwei"]
    assert aligned("Eins\nZwei", 3) is None
    assert aligned("Eins\nZwei", 1) == ["Eins Zwei"]
    assert aligned("", 1) == [""]
    assert aligned("", 2) is None


def test_sentences_of_a_document_are_asked_for_together_and_come_back_by_line(
    config: dict[str, Any], documents_dir: Path, tmp_path: Path
) -> None:
    keys = settings(config, documents_dir, document=True)
    test_set = load_test_set("documents", tmp_path, EN_DE)
    found = documents_of(keys.systems[0], EN_DE, test_set, tmp_path)
    assert found[0].request.message.endswith("### Input:\n" + "\n".join(ENGLISH[:3]))
    done = run(keys, test_set, tmp_path / "out", shouting())
    assert done.lines == [line.upper() for line in ENGLISH]
    assert done.unaligned == [False] * len(ENGLISH)
    assert done.thoughts == [True] * len(ENGLISH)
    assert Store(tmp_path / "out", "en-de", len(ENGLISH)).finished("f") == done


@pytest.mark.parametrize("breaks_after", range(7))
def test_a_document_that_does_not_fit_is_translated_by_sentence_also_after_a_kill(
    breaks_after: int, config: dict[str, Any], documents_dir: Path, tmp_path: Path
) -> None:
    keys = settings(config, documents_dir, document=True)
    test_set = load_test_set("documents", tmp_path, EN_DE)
    bad = [ENGLISH[1]]
    done = run(keys, test_set, tmp_path / "out", shouting(breaks_after, bad), shouting(bad=bad))
    assert done.lines == [line.upper() for line in ENGLISH]
    assert done.unaligned == [True] * 3 + [False] * (len(ENGLISH) - 3)
    assert done.seconds is not None
    assert done.seconds > 0


def test_what_a_real_model_does_not_align_is_its_translation_of_the_sentences_and_is_counted(
    config: dict[str, Any], documents_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The random model writes no line breaks, so that only documents of one sentence fit."""
    config |= {"baseline": None, "teacher": None, "max_new_tokens": 12}
    model = config["systems"]["one"]
    config["systems"] = {"sentences": model, "documents": {**model, "document": True}}
    with caplog.at_level(logging.WARNING):
        results = evaluate_settings(settings(config, documents_dir))
    assert results is not None
    folder = Path(config["save_dir"]) / "hypotheses"
    texts = [(folder / name / "en-de.txt").read_text(encoding="utf-8") for name in ("sentences", "documents")]
    assert texts[0] == texts[1]
    guards = {name: entry["guards"]["en-de"]["unaligned"] for name, entry in results["systems"].items()}
    assert guards == {"sentences": None, "documents": pytest.approx(7 / 10)}
    assert results["prompts"]["documents"] == {"document": True}
    assert results["fingerprints"]["sentences"] != results["fingerprints"]["documents"]
    assert "2 of 5 documents came back with another number of lines; their 7 sentences" in caplog.text
    report = (Path(config["save_dir"]) / "report.md").read_text(encoding="utf-8")
    assert "unaligned document" in report
    assert "**70.0 %**" in report


def test_a_test_set_without_names_of_documents_is_refused(config: dict[str, Any], task_dir: Path) -> None:
    keys = parse_settings({**config, "document": True, "directions": ["en-de"]}, "eval.yaml")
    test_set = load_test_set("wmt22", task_dir, EN_DE)
    with pytest.raises(EvaluationError, match=r"the test set wmt22 en-de names no documents: .* en-de\.docid"):
        documents_of(keys.systems[0], EN_DE, test_set, task_dir)


def test_no_sentence_of_a_document_is_its_example(config: dict[str, Any], documents_dir: Path, tmp_path: Path) -> None:
    keys = settings(config, documents_dir, document=True, examples={"from": str(documents_dir), "number": 4})
    test_set = load_test_set("documents", tmp_path, EN_DE)
    for document in documents_of(keys.systems[0], EN_DE, test_set, tmp_path):
        shown = {message.rpartition("### Input:\n")[2] for message, _ in document.request.examples}
        assert len(shown) == 4
        assert shown.isdisjoint(ENGLISH[place] for place in document.places)


def test_almas_files_may_name_documents_by_a_field_or_by_a_file(tmp_path: Path) -> None:
    records = [
        {"translation": {"en": en, "de": de}, "doc": name or None}
        for en, de, name in zip(ENGLISH, GERMAN, NAMES, strict=True)
    ]
    path = tmp_path / "deen" / "test.en-de.json"
    path.parent.mkdir()
    path.write_text(json.dumps([{k: v for k, v in one.items() if v is not None} for one in records]))
    assert load_test_set("wmt22", tmp_path, EN_DE).documents == tuple(NAMES)
    write_lines(path.with_name("test.en-de.docid"), ["x"] * len(NAMES))
    assert set(load_test_set("wmt22", tmp_path, EN_DE).documents) == {"x"}
    write_lines(path.with_name("test.en-de.docid"), ["x"])
    with pytest.raises(DataError, match="has 1 names of documents, not 10"):
        load_test_set("wmt22", tmp_path, EN_DE)
