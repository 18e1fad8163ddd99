from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.prompts import prompt
from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.webui.page import LoadedModel, words
from llamafactory_sekd.webui.token_comparison import Column, Comparison, Token, compare, pieces
from llamafactory_sekd.webui.tokens_section import render


SOURCE, REFERENCE = tiny.SENTENCES[0]
EN_DE = Direction("en", "de")


def loaded(directory: Path) -> LoadedModel:
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def encode(message: str, response: str) -> tuple[list[int], list[int]]:
        text = prompt("\0", EN_DE)
        head, tail = text.split("### Input:\n\0")
        full = head.rsplit("Translate", 1)[0] + message + tail
        return [tokenizer.bos_token_id, *tokenizer.encode(full)], [*tokenizer.encode(response), tokenizer.eos_token_id]

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    return LoadedModel(directory.name, tokenizer, model, encode, [tokenizer.eos_token_id])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedModel]:
    root = tmp_path_factory.mktemp("tokens")
    sizes = {"before": 32, "after": 32, "teacher": 48}
    return [loaded(tiny.save_llama(root / name, seed=seed, width=sizes[name])) for seed, name in enumerate(sizes)]


def naive_difficulties(student: LoadedModel, teacher: LoadedModel, kd_lambda: float) -> list[float]:
    """Equation 5 for every token of the reference, one forward pass and one sum per token, in float64."""
    tokenizer = student.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt(SOURCE, EN_DE))]
    difficulties = []
    for token in [*tokenizer.encode(REFERENCE), tokenizer.eos_token_id]:
        with torch.no_grad():
            q, p = (
                model.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1).tolist()
                for model in (student, teacher)
            )
        target = [kd_lambda * probability for probability in p]
        target[token] += 1 - kd_lambda
        terms = [
            y * (torch.tensor(y).double().log() - torch.tensor(q_i).double().log()).item()
            for y, q_i in zip(target, q, strict=True)
        ]
        difficulties.append(sum(terms))
        ids.append(token)

    return difficulties


def test_every_target_token_has_the_difficulty_of_equation_5_for_both_students(models):
    objective = {"kd_loss": "self_evolution", "kd_lambda": 0.3, "kd_gamma": 2.0}
    comparison = compare(models, SOURCE, REFERENCE, EN_DE, objective)
    for student, column in zip(models, (comparison.before, comparison.after, comparison.teacher), strict=True):
        expected = naive_difficulties(student, models[2], 0.3)
        assert [token.difficulty for token in column.tokens] == pytest.approx(expected, rel=1e-4)
        assert [token.hard for token in column.tokens] == [value > 2.0 for value in expected]
        assert column.hard_share == pytest.approx(sum(value > 2.0 for value in expected) / len(expected))
        assert column.mean_difficulty == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_a_teacher_that_is_its_own_student_finds_nothing_difficult_where_it_alone_is_the_target(models):
    comparison = compare(models, SOURCE, REFERENCE, EN_DE, {"kd_lambda": 1.0})
    assert [token.difficulty for token in comparison.teacher.tokens] == pytest.approx(
        [0.0] * len(comparison.teacher.tokens), abs=1e-6
    )


def test_translations_are_greedy_whatever_the_checkpoint_says_of_sampling(models):
    models[0].model.generation_config.do_sample = True
    models[0].model.generation_config.temperature = 5.0
    translations = {compare(models, SOURCE, REFERENCE, EN_DE, {}).before.translation for _ in range(2)}
    assert len(translations) == 1


def test_a_padded_head_is_cut_and_another_tokenizer_refused(models, tmp_path):
    padded = loaded(tiny.save_llama(tmp_path / "padded", seed=0, width=32, vocab_size=400))
    comparison = compare([padded, models[1], models[2]], SOURCE, REFERENCE, EN_DE, {})
    assert len(comparison.before.tokens) == len(comparison.after.tokens)
    padded.tokenizer.add_tokens(["Nashorn"])
    with pytest.raises(TeacherError, match="the teacher's tokenizer is not the student's"):
        compare([padded, models[1], models[2]], SOURCE, REFERENCE, EN_DE, {})


@pytest.mark.parametrize("text", ["Das Haus.", "Zwölf Äpfel für 3 €", "日本語 🙂 text", "  two  spaces\nand a line"])
def test_the_pieces_of_the_tokens_join_to_the_text(models, text):
    tokenizer = models[0].tokenizer
    ids = tokenizer.encode(text)
    shown = pieces(tokenizer, [*ids, tokenizer.eos_token_id])
    assert len(shown) == len(ids) + 1
    assert "".join(piece for piece in shown[:-1] if piece != "…") == text
    assert shown[-1] == "</s>"


def test_the_view_escapes_every_text_and_marks_hard_tokens():
    tokens = (Token("<b>", 2.0, True, 1.0, 0.5), Token(" x", 0.0, False, 0.1, 0.1))
    column = Column('name"<i>', "<script>1</script>", tokens)
    html = render(Comparison("<s>", "&", column, column, column), "kd_loss <skew>", words("en"))
    for raw in ("<b>&lt;", "<script>", "<i>", "<skew>", "<s>"):
        assert raw not in html
    assert html.count("sekd-token sekd-hard") == 4  # one in each column, one in the legend
    assert "&lt;script&gt;" in html
    assert 'title="hard · d 2.000' in html


def test_tokens_without_any_difficulty_can_be_drawn():
    column = Column("m", "t", (Token("x", 0.0, False, 0.0, 0.0),))
    assert "0.00" in render(Comparison("s", "r", column, column, column), "", words("ja"))
