"""One sentence through three models: translations, and the difficulty of every target token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.prompts import PARROT, Prompt
from llamafactory_sekd.evaluation.decoding import hf_translate
from llamafactory_sekd.evaluation.evaluation_settings import Decoding
from llamafactory_sekd.evaluation.systems import BatchLimits
from llamafactory_sekd.objectives import distillation_loss
from llamafactory_sekd.teacher import check_tokenizers, common_vocabulary
from llamafactory_sekd.webui.page import LoadedModel


@dataclass(frozen=True)
class Token:
    """A target token as a student sees it.

    Attributes:
        text: what it adds to the sentence.
        difficulty: ``d = KL(y~ ‖ q)`` (equation 5), in nats.
        hard: whether the objective takes it for hard.
        student_ce: ``-log q_y``, in nats.
        teacher_ce: ``-log p_y``, in nats.
    """

    text: str
    difficulty: float
    hard: bool
    student_ce: float
    teacher_ce: float


@dataclass(frozen=True)
class Column:
    """One model: its name, its greedy translation, the reference's tokens as it sees them."""

    name: str
    translation: str
    tokens: tuple[Token, ...]

    @property
    def mean_difficulty(self) -> float:
        """Mean over the tokens, in nats."""
        return sum(token.difficulty for token in self.tokens) / len(self.tokens)

    @property
    def hard_share(self) -> float:
        """The share of hard tokens, 0 to 1."""
        return sum(token.hard for token in self.tokens) / len(self.tokens)


@dataclass(frozen=True)
class Comparison:
    """The three columns for one sentence; the teacher's takes the teacher as its own student."""

    source: str
    reference: str
    before: Column
    after: Column
    teacher: Column


def compare(
    models: Sequence[LoadedModel],
    source: str,
    reference: str,
    direction: Direction,
    objective: Mapping[str, Any],
    prompt: Prompt = PARROT,
) -> Comparison:
    """Translate with all three models and score the reference's tokens, its end token included.

    Args:
        models: the student before training, the student after it, and the teacher.
        source: the sentence to translate.
        reference: its translation, the ground truth.
        direction: the languages, for the prompt.
        objective: keyword arguments of ``objectives.distillation_loss``.
        prompt: what the models are asked; ``{source}`` alone asks the source itself, for models that do not translate.

    Raises:
        TeacherError: teacher and student do not mean the same by a token id.
    """
    before, after, teacher = models
    for student in (before, after):
        check_tokenizers(student.tokenizer, teacher.tokenizer)

    question, response = before.encode(prompt.user_message(source, direction), reference)
    teacher_logits = _response_logits(teacher, question, response)
    columns = [
        _column(model, question, response, _response_logits(model, question, response), teacher_logits, objective)
        for model in (before, after)
    ]
    columns.append(_column(teacher, question, response, teacher_logits, teacher_logits, objective))
    return Comparison(source, reference, *columns)


def _column(
    model: LoadedModel,
    prompt: list[int],
    response: list[int],
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    objective: Mapping[str, Any],
) -> Column:
    vocab_size, _ = common_vocabulary(model.tokenizer, logits.shape[-1], teacher_logits.shape[-1])
    output = distillation_loss(
        logits[:, :vocab_size], teacher_logits[:, :vocab_size], torch.tensor(response), **objective
    )
    statistics = output.statistics
    tokens = zip(
        pieces(model.tokenizer, response),
        output.difficulty.tolist(),
        output.hard.tolist(),
        statistics.ce.tolist(),
        statistics.teacher_ce.tolist(),
        strict=True,
    )
    return Column(model.name, _translate(model, prompt), tuple(Token(*token) for token in tokens))


@torch.no_grad()
def _response_logits(model: LoadedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Logits ``[response tokens, vocab]``, float32 on the CPU, each conditioned on the ground truth before it."""
    input_ids = torch.tensor([prompt + response], device=model.model.device)
    logits = model.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1].float().cpu()


def _translate(model: LoadedModel, prompt: list[int]) -> str:
    """Return what the evaluation of this model finds: greedy decoding."""
    translate = hf_translate(
        model.model,
        decode=lambda rows: model.tokenizer.batch_decode(rows, skip_special_tokens=True),
        stop_ids=model.stop_ids,
        pad_id=model.tokenizer.pad_token_id,
        decoding=Decoding(),
    )
    ((_, translation),) = next(translate([prompt], BatchLimits(tokens=0)))
    return translation.text


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text; a token that holds only part of a character is shown as "…".

    Special tokens are shown by their names.
    """
    texts: list[str] = []
    start, shown = 0, ""
    for index, token_id in enumerate(ids):
        if token_id in tokenizer.all_special_ids:
            texts.append(str(tokenizer.convert_ids_to_tokens(token_id)))
            start, shown = index + 1, ""
            continue
        text = tokenizer.decode(ids[start : index + 1])
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            texts.append("…")
            continue
        texts.append(text[len(shown) :])
        shown = text

    return texts
