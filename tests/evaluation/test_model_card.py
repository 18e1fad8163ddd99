"""A model's card tells teacher, objective and scores, and keeps what others wrote in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.sentences import ENGLISH, GERMAN, write_lines
from huggingface_hub import ModelCard

from llamafactory_sekd.cli import main
from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.model_card import write_scores, write_training


HOST_CARD = """---
library_name: transformers
license: other
base_model: llama-7b
tags:
- llama-factory
- full
- generated_from_trainer
---

# sekd

Edited by hand.
"""
OPENING = [
    "Knowledge distillation (`stage: sekd`)",
    "  objective  self_evolution: …",
    "  teacher    saves/llama13b/sft",
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text(HOST_CARD)
    return folder


@pytest.fixture
def evaluated(tmp_path: Path, model: Path) -> Path:
    """An evaluation of translations, one of whose systems is then said to be the model."""
    from llamafactory_sekd.evaluation.evaluation_settings import parse_settings
    from llamafactory_sekd.host.evaluate import evaluate_settings

    write_lines(tmp_path / "en-de.en", ENGLISH)
    write_lines(tmp_path / "en-de.de", GERMAN)
    for name in ("sft", "sekd"):
        write_lines(tmp_path / name / "en-de.txt", [*GERMAN[:8], *ENGLISH[8:]])
    config: dict[str, Any] = {
        "task": "mine",
        "task_dir": str(tmp_path),
        "directions": ["en-de"],
        "systems": {name: {"hypotheses": str(tmp_path / name)} for name in ("sft", "sekd")},
        "metrics": ["bleu", "ter"],
        "baseline": "sft",
        "save_dir": str(tmp_path / "results"),
    }
    results = evaluate_settings(parse_settings(config, "eval.yaml"))
    assert results is not None
    results["systems"]["sekd"]["model"] = {"model_name_or_path": str(model)}
    (tmp_path / "results" / "results.json").write_text(json.dumps(results))
    return tmp_path / "results"


def test_the_card_tells_how_the_model_was_trained(model: Path) -> None:
    for _ in range(2):  # a run that continues writes it once more
        write_training(model / "README.md", OPENING, ["alma_en_de"])
    card = ModelCard.load(model / "README.md")
    assert card.data.tags == [
        "llama-factory",
        "full",
        "generated_from_trainer",
        "knowledge-distillation",
        "translation",
    ]
    assert card.data.base_model == "llama-7b"
    for text in ("saves/llama13b/sft", "self_evolution", "alma_en_de", "arxiv.org/abs/2412.15303", "Edited by hand."):
        assert card.text.count(text) == 1


def test_the_command_renews_the_scores_and_nothing_else(
    model: Path, evaluated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_training(model / "README.md", OPENING, ["alma_en_de"])
    monkeypatch.setattr("sys.argv", ["sekd", "card", str(model), "--results", str(evaluated)])
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 0
    assert "the scores of sekd" in capsys.readouterr().out
    card = ModelCard.load(model / "README.md")
    results = json.loads((evaluated / "results.json").read_text())
    bleu = results["systems"]["sekd"]["scores"]["en-de"]["bleu"]
    assert card.text.count(f"{bleu:.1f} ± ") == 1
    assert "| | BLEU | TER ↓ |" in card.text
    assert results["signatures"]["en-de"]["bleu"] in card.text
    assert "saves/llama13b/sft" in card.text
    assert card.data.language == ["en", "de"]


def test_what_is_missing_is_named(model: Path, evaluated: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"holds no model"):
        write_scores(tmp_path, evaluated)
    with pytest.raises(EvaluationError, match=r"has no results\.json"):
        write_scores(model, tmp_path)
    with pytest.raises(EvaluationError, match=r"has no system 'teacher', but sft, sekd\."):
        write_scores(model, evaluated, "teacher")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(EvaluationError, match=r"pass --system, one of sft, sekd\."):
        write_scores(other, evaluated)
    assert write_scores(other, evaluated, "sft") == "sft"
