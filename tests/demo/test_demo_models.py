"""The demo's models: what its prompt costs, and what the student inherits."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_sekd.data.prompts import prompt, record
from llamafactory_sekd.demo.data import DIRECTION
from llamafactory_sekd.demo.models import prompt_pieces, save_student, save_untrained, train_tokenizer


PAIRS = [(f"Turn on lamp {number}", f"Lampe {number} einschalten") for number in range(40)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo_models")
    (folder / "train.json").write_text(json.dumps([record(*pair, DIRECTION) for pair in PAIRS]), encoding="utf-8")
    save_untrained([folder / "train.json"], DIRECTION, folder / "teacher")
    return folder / "teacher"


def test_the_prompt_costs_two_tokens_and_its_text_stays_as_it_is(teacher):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    text = prompt("Turn on lamp 3", DIRECTION)

    ids = tokenizer.encode(text)

    assert len(ids) == 2 + len(tokenizer.encode("Turn on lamp 3"))
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode(ids[:1]), tokenizer.decode(ids[-1:])] == list(prompt_pieces(DIRECTION))


def test_the_vocabulary_has_the_size_that_was_asked_for():
    texts = [side for pair in PAIRS for side in pair]
    assert len(train_tokenizer(texts, DIRECTION, vocab_size=300)) == 300


def test_any_text_survives_the_tokenizer(teacher):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    for text in ("Größe: 5 °C – „gut“", "日本語", "  two  spaces"):
        assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_the_student_is_the_teacher_without_its_middle_layers(teacher, tmp_path):
    save_student(teacher, tmp_path / "student")

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    assert student.config.num_hidden_layers == len(student.model.layers) == 2
    for kept, original in ((0, 0), (1, -1)):
        original_state = model.model.layers[original].state_dict()
        for name, value in student.model.layers[kept].state_dict().items():
            torch.testing.assert_close(value, original_state[name], rtol=0, atol=0)

    for layer in model.model.layers[1:-1]:  # a layer that adds nothing is as good as no layer
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(projection.weight)
    ids = torch.tensor(
        [AutoTokenizer.from_pretrained(tmp_path / "student").encode(prompt("Turn on lamp 3", DIRECTION))]
    )
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, model(ids).logits)
        cached = student.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
        assert cached.tolist() == student.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False).tolist()
