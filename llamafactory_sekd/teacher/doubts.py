"""What a teacher makes of references: how probable they are to it, and how difficult to a student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llamafactory_sekd.objectives import distillation_loss
from llamafactory_sekd.objectives.equations import cross_entropy
from llamafactory_sekd.teacher.cache.filling import collate
from llamafactory_sekd.teacher.cache.segments import Segment
from llamafactory_sekd.teacher.model import Teacher


# The teacher doubts a token of a reference to which it gives a probability below this.
DOUBTED = 0.1


@dataclass(frozen=True)
class Verdict:
    """A reference, token by token, its end token included.

    Attributes:
        surprise: the teacher's ``-log p_y`` in nats, ``[tokens]``.
        difficulty: equation 5 in nats, ``[tokens]``; None without a student.
    """

    surprise: np.ndarray
    difficulty: np.ndarray | None = None

    @property
    def probability(self) -> float:
        """Return the geometric mean of the teacher's probabilities of the tokens."""
        return float(np.exp(-self.surprise.mean()))

    @property
    def doubted(self) -> float:
        """Return the share of tokens that the teacher doubts."""
        return float((self.surprise > -np.log(DOUBTED)).mean())


def judge(
    examples: Sequence[Segment],
    teacher: Teacher,
    student: Teacher | None = None,
    *,
    batch_size: int,
    device: torch.device,
    kd_lambda: float = 0.5,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Verdict]:
    """Let the teacher read references; with a student, measure their difficulty as well.

    Args:
        examples: prompt and reference of each pair.
        teacher, student: models that return logits.
        batch_size: examples in a forward pass, which come sorted by length.
        device: where the batches are made.
        kd_lambda: λ of equation 4.
        progress: called with the number of examples after each batch.

    Returns:
        A verdict for each example, in order.
    """
    verdicts: dict[int, Verdict] = {}
    # The longest first: what does not fit into memory shows at once.
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        parts = [examples[index] for index in chosen]
        verdicts.update(zip(chosen, _judge_batch(parts, teacher, student, device, kd_lambda), strict=True))
        progress(len(chosen))
    return [verdicts[index] for index in range(len(examples))]


def _judge_batch(
    parts: Sequence[Segment], teacher: Teacher, student: Teacher | None, device: torch.device, kd_lambda: float
) -> Iterator[Verdict]:
    inputs, rows = collate(parts, 0, device)
    labels = inputs["input_ids"].roll(-1, 1)[rows]
    answers = teacher.logits(inputs, rows).float()
    surprise = cross_entropy(answers.log_softmax(-1), labels)
    columns = [surprise]
    if student is not None:
        own = student.logits(inputs, rows).float()
        common = min(own.shape[-1], answers.shape[-1])  # a head may have unused rows at its end
        both = (own[:, :common], answers[:, :common])
        columns.append(distillation_loss(*both, labels, kd_loss="no_evolution", kd_lambda=kd_lambda).difficulty)
    ends = np.cumsum([part.tokens for part in parts])[:-1]
    for pieces in zip(*(np.split(column.cpu().numpy(), ends) for column in columns), strict=True):
        yield Verdict(*pieces)
