"""A model is asked what the prompt says, with examples that are never the sentence itself; its thoughts come off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.sentences import ENGLISH, GERMAN, write_lines
from sacrebleu.metrics.chrf import CHRF

from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.evaluation_run import prepare
from llamafactory_sekd.evaluation.evaluation_settings import Settings, parse_settings
from llamafactory_sekd.evaluation.scores import Nearest
from llamafactory_sekd.evaluation.systems import Request, requests_of
from llamafactory_sekd.evaluation.translation_store import split_thought
from llamafactory_sekd.host.evaluate import build_host, evaluate_settings
from llamafactory_sekd.host.templates import decoder, thought_tokens


EN_DE = parse_direction("en-de")


def settings(config: dict[str, Any], **changes: Any) -> Settings:
    return parse_settings({**config, **changes}, "eval.yaml")


def asked(config: dict[str, Any], task_dir: Path, **changes: Any) -> list[Request]:
    system = settings(config, **changes).systems[0]
    return requests_of(system, EN_DE, load_test_set("wmt22", task_dir, EN_DE), task_dir)


def test_the_prompt_fills_its_fields_and_a_system_may_have_its_own(config: dict[str, Any], task_dir: Path) -> None:
    text = "{source_code}>{target_code} {source_language} to {target_language}: {source}"
    assert asked(config, task_dir, prompt=text)[0].message == f"en>de English to German: {ENGLISH[0]}"
    config["systems"]["one"]["prompt"] = "plain"
    assert asked(config, task_dir, prompt=text)[0].message.endswith(f"German.\n\n{ENGLISH[0]}")
    assert [system.prompt.name for system in settings(config).systems] == ["plain", "parrot", "parrot"]


def test_the_nearest_examples_are_those_of_sacrebleus_chrf() -> None:
    metric = CHRF()
    pool = [*ENGLISH, "", "a", "The the the the"]
    nearest = Nearest(pool)
    for sentence in (*ENGLISH[:3], "A short one.", "ä"):
        expected = [metric.sentence_score(other, [sentence]).score / 100 for other in pool]
        assert nearest.scores(sentence) == pytest.approx(np.array(expected), abs=1e-6)


def test_a_sentence_is_never_its_own_example(config: dict[str, Any], task_dir: Path) -> None:
    shots = {"from": str(task_dir), "number": 3}
    requests = asked(config, task_dir, prompt="plain", examples=shots)
    for source, request in zip(ENGLISH, requests, strict=True):
        assert len(request.examples) == 3
        shown = [message.rpartition("\n")[2] for message, _ in request.examples]
        assert source not in shown
        assert all(
            GERMAN[ENGLISH.index(text)] == answer for text, (_, answer) in zip(shown, request.examples, strict=True)
        )
    first = asked(config, task_dir, prompt="plain", examples={**shots, "choose": "first"})
    assert [message.rpartition("\n")[2] for message, _ in first[5].examples] == [ENGLISH[2], ENGLISH[1], ENGLISH[0]]
    with pytest.raises(EvaluationError, match=f"has {len(ENGLISH) - 1} other sentences, and 50 are asked for"):
        asked(config, task_dir, examples={**shots, "number": 50})


def test_null_in_a_system_takes_back_what_all_share(config: dict[str, Any], task_dir: Path) -> None:
    config["systems"]["one"] |= {"examples": None, "prompt": None, "system_prompt": None}
    shared = {"examples": {"from": str(task_dir), "number": 1}, "prompt": "plain", "system_prompt": "Be brief."}
    one, two, _ = settings(config, **shared).systems
    assert (one.examples, one.prompt.name, "default_system" in (one.model or {})) == (None, "parrot", False)
    assert two.examples is not None
    assert (two.prompt.name, "default_system" in (two.model or {})) == ("plain", True)


def test_the_model_reads_system_prompt_examples_and_message(config: dict[str, Any], models: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    keys = settings(config, template="chatml", system_prompt="Be the best.", backend="hf")
    host = build_host(keys)
    request = Request("the house", (("the garden", "der Garten"),))
    ids = host.load(keys.systems[0]).encode(request)
    text = AutoTokenizer.from_pretrained(models["one"]).decode(ids)
    places = [text.replace(" ", "").find(part) for part in ("Bethebest.", "thegarden", "derGarten", "thehouse")]
    assert places == sorted(places)
    assert places[0] >= 0
    other = settings(config, template="chatml")
    plain = build_host(other).load(other.systems[0]).encode(Request("the house"))
    assert "best" not in AutoTokenizer.from_pretrained(models["one"]).decode(plain), "one system's prompt leaks"


@pytest.mark.parametrize(
    ("changes", "said"), [({}, 0), ({"template": "chatml"}, 2), ({"template": "chatml", "prompt": "plain"}, 0)]
)
def test_parrots_prompt_in_another_template_gets_a_line_for_each_model(
    changes: dict[str, str], said: int, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    keys = settings(config, **changes)
    prepare(keys, build_host(keys))
    assert sum("the prompt is Parrot's" in record.getMessage() for record in caplog.records) == said


def test_whatever_is_asked_is_part_of_the_fingerprint(config: dict[str, Any], task_dir: Path, tmp_path: Path) -> None:
    config |= {"directions": ["en-de"], "max_new_tokens": 4, "baseline": None, "teacher": None}
    config["systems"] = {"one": config["systems"]["one"]}
    changes: list[dict[str, Any]] = [
        {},
        {"prompt": "plain"},
        {"system_prompt": "Be brief."},
        {"examples": {"from": str(task_dir), "number": 1}},
    ]
    prints = []
    for number, change in enumerate(changes):
        results = evaluate_settings(settings(config, save_dir=str(tmp_path / str(number)), **change))
        assert results is not None
        prints.append(results["fingerprints"]["one"]["en-de"])
        assert bool(results["prompts"]) == bool(change)
    assert len(set(prints)) == len(changes)


@pytest.mark.parametrize(
    ("line", "own", "text", "thought"),
    [
        ("Der Fluss", None, "Der Fluss", False),
        ("<think> </think> Der Fluss", None, "Der Fluss", True),
        ("<think> Hm, a river. </think> Der Fluss", ("<think>\n", "\n</think>\n\n"), "Der Fluss", True),
        ("A river. </think> Der Fluss", None, "Der Fluss", True),  # the prompt opened it
        ("<think> A river, so", None, "", True),  # the limit cut it off
        ("◁think▷ Hm ◁/think▷ Fluss", None, "Fluss", True),
        ("[THINK]A river.[/THINK]Der Fluss", ("<think>", "</think>"), "Der Fluss", True),
        ("<seed:think>Hm</seed:think>Fluss", None, "Fluss", True),
        (
            "<|channel|>analysis<|message|>A river.<|end|><|start|>assistant<|channel|>final<|message|>Der Fluss",
            ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
            "Der Fluss",
            True,
        ),
        ("<|channel|>analysis<|message|>A river, so", None, "", True),
        ("analysisA river.assistantfinalDer Fluss", None, "Der Fluss", True),
        ("analysis of the river", None, "analysis of the river", False),
        ("<|channel>thought Hm <channel|>Fluss", None, "Fluss", True),
        ("((a river)) Fluss", ("((", "))"), "Fluss", True),
    ],
)
def test_thoughts_are_no_part_of_a_translation(
    line: str, own: tuple[str, str] | None, text: str, thought: bool
) -> None:
    assert split_thought(line, own) == (text, thought)


def test_special_tokens_that_tell_thoughts_stay_until_the_thoughts_are_off(models: dict[str, Path]) -> None:
    """Without its channels, gpt-oss's thought and answer are one text: "analysisHm.assistantfinalFluss"."""
    from llamafactory.data.template import TEMPLATES
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["one"])
    words = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "[THINK]", "[/THINK]", "<|other|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": words})
    template = TEMPLATES["gpt_oss"]
    texts = [
        "".join(template.thought_words).join(["", "<|other|> the river"]),
        "[THINK]the[/THINK] river",
        "the river",
    ]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]

    found = [split_thought(text.strip(), template.thought_words) for text in decoder(tokenizer, template)(rows)]

    assert found == [("the river", True), ("river", True), ("the river", False)]
    assert not thought_tokens(AutoTokenizer.from_pretrained(models["one"]), template)


def test_translations_with_empty_thoughts_are_scored_without_them(config: dict[str, Any], tmp_path: Path) -> None:
    write_lines(tmp_path / "thinking" / "en-de.txt", [f"<think> </think> {line}" for line in GERMAN])
    config |= {"directions": ["en-de"], "baseline": None, "teacher": None}
    config["systems"] = {"thinking": {"hypotheses": str(tmp_path / "thinking")}}
    results = evaluate_settings(settings(config))
    assert results is not None
    found = results["systems"]["thinking"]
    assert found["scores"]["en-de"]["bleu"] == pytest.approx(100)
    assert found["guards"]["en-de"]["thoughts"] == 1
    written = Path(config["save_dir"]) / "hypotheses" / "thinking" / "en-de.txt"
    assert written.read_text(encoding="utf-8").splitlines() == GERMAN
    assert "thoughts" in (Path(config["save_dir"]) / "report.md").read_text(encoding="utf-8")


def test_a_text_without_references_has_guards_and_says_why_it_has_no_score(
    config: dict[str, Any], tmp_path: Path, human: Path
) -> None:
    write_lines(tmp_path / "texts" / "en-de.en", ENGLISH)
    config |= {"task": "texts", "task_dir": str(tmp_path), "directions": ["en-de"], "teacher": "two"}
    results = evaluate_settings(
        settings({**config, "systems": {name: {"hypotheses": str(human)} for name in ("one", "two")}})
    )
    assert results is not None
    assert set(results["skipped"]) == {"bleu", "chrf"}
    assert results["systems"]["one"]["guards"]["en-de"]["empty"] == 0
    assert results["systems"]["one"]["guards"]["en-de"]["length_ratio"] is None
    assert results["systems"]["one"]["similarity"]["en-de"] == pytest.approx(100)
    assert "en-de has no references" in (Path(config["save_dir"]) / "report.md").read_text()


def test_several_references_domains_and_documents_reach_the_report(
    config: dict[str, Any], tmp_path: Path, human: Path
) -> None:
    folder = tmp_path / "news"
    write_lines(folder / "en-de.en", ENGLISH)
    write_lines(folder / "en-de.de", GERMAN)
    write_lines(folder / "en-de.de.2", [line.replace("die", "diese") for line in GERMAN])
    write_lines(folder / "en-de.domain", ["news"] * 4 + ["chat"] * (len(ENGLISH) - 4))
    config |= {"task": "news", "task_dir": str(tmp_path), "directions": ["en-de"], "baseline": None, "teacher": None}
    results = evaluate_settings(settings({**config, "systems": {"human": {"hypotheses": str(human)}}}))
    assert results is not None
    assert results["systems"]["human"]["scores"]["en-de"]["bleu"] == pytest.approx(100)
    assert "nrefs:2" in results["signatures"]["en-de"]["bleu"]
    assert {name: one["sentences"] for name, one in results["by_domain"]["en-de"].items()} == {
        "news": 4,
        "chat": len(ENGLISH) - 4,
    }
    report = (Path(config["save_dir"]) / "report.md").read_text()
    assert "2 references" in report
    assert "news (4)" in report
    json.dumps(results, allow_nan=False)
