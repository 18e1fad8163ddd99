"""MetricX's scores are those of its authors' formula, worked out here stack by stack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.sentences import ENGLISH, GERMAN
from helpers.tiny_metricx import save_metricx

from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.metric_models import prepare_metricx
from llamafactory_sekd.evaluation.scores import Texts
from llamafactory_sekd.fingerprints import Digests
from llamafactory_sekd.reporting.metric_labels import best_of, metric_label


WORSE = [line[: len(line) // 2] for line in GERMAN]


def formula(folder: Path, texts: list[str]) -> list[float]:
    """Score one text at a time: encoder, a decoder that reads one zero, one row of the head, between 0 and 25."""
    from transformers import AutoTokenizer, MT5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = MT5ForConditionalGeneration.from_pretrained(folder).eval()
    scores = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"][:-1]])  # without the token of the end
            hidden = model.encoder(input_ids=ids).last_hidden_state
            decoded = model.decoder(input_ids=torch.zeros((1, 1), dtype=torch.long), encoder_hidden_states=hidden)
            scores.append((decoded.last_hidden_state[0, 0] @ model.lm_head.weight[250089]).clamp(0, 25).item())
    return scores


@pytest.mark.parametrize(
    ("name", "has_references", "form"),
    [
        ("metricx-24-hybrid-tiny", True, "source: {0} candidate: {1} reference: {2}"),
        ("metricx-24-hybrid-tiny", False, "source: {0} candidate: {1}"),
        ("metricx-23-tiny", True, "candidate: {1} reference: {2}"),
        ("metricx-23-qe-tiny", True, "candidate: {1} source: {0}"),
    ],
)
def test_scores_are_those_of_the_published_formula(name: str, has_references: bool, form: str, tmp_path: Path) -> None:
    folder = save_metricx(tmp_path / name, ENGLISH + GERMAN)
    scorer = prepare_metricx(str(folder), Digests(), has_references)
    place = tmp_path / "en-de.metricx.json"
    found = scorer.score({place: Texts(ENGLISH, WORSE, GERMAN if has_references else None)})[place]
    texts = [form.format(*row) for row in zip(ENGLISH, WORSE, GERMAN, strict=True)]
    assert found == pytest.approx(formula(folder, texts), abs=1e-4)
    assert len({round(score, 3) for score in found}) > 2, "scores that are all alike would compare nothing"
    assert scorer.needs_references == (name == "metricx-23-tiny")
    assert "precision:float32" in scorer.signature


def test_an_error_is_shown_as_one() -> None:
    assert metric_label("metricx") == "MetricX ↓"
    assert best_of("metricx", [3.0, 1.5]) == 1.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some-model", "must be named after a MetricX-23 or MetricX-24 model"),
        ("{tmp}/metricx-24-none", "does not exist"),
        ("{tmp}/metricx-24-llama", "is no MetricX model: it is of type llama"),
    ],
)
def test_a_model_that_is_none_is_named(name: str, message: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=10).save_pretrained(tmp_path / "metricx-24-llama")
    with pytest.raises(EvaluationError) as caught:
        prepare_metricx(name.format(tmp=tmp_path), Digests(), True)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
