"""What training reports about every token, whatever the objective."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from llamafactory_sekd.objectives.equations import cross_entropy, kl_divergence


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """One value per response token, `[tokens]`, float32 (float64 for float64 inputs), detached.

    Attributes:
        difficulty: equation 5, `d = KL(y~ ‖ q)`, at the temperature of the objective and without its factor T².
        hard: 1 for hard tokens (see `DistillationOutput.hard`), 0 for easy ones.
        ce: `-log q_y`, the student's cross-entropy of the ground truth, at T = 1.
        teacher_kl: `KL(p ‖ q)` at T = 1.
        teacher_ce: `-log p_y`, the teacher's cross-entropy of the ground truth, at T = 1.
        agreement: 1 where the teacher's most probable entry is one of the student's most probable ones (they are one
            unless there is a tie), else 0.
        easy_norm, hard_norm: of hard tokens `‖q - y~‖` and `‖q Σr - r‖`, the Euclidean norms of the gradients that
            the easy and the hard loss have with respect to the logits, but for a factor T; 0 for easy tokens. None
            without `kd_hard_scale` or without a gradient.
        signal: what the gate of a formula looks at; the difficulty without a gate. None for other objectives. Where
            the gate has a width, `hard` is the degree to which the token is hard, from 0 to 1.
    """

    difficulty: torch.Tensor
    hard: torch.Tensor
    ce: torch.Tensor
    teacher_kl: torch.Tensor
    teacher_ce: torch.Tensor
    agreement: torch.Tensor
    easy_norm: torch.Tensor | None = None
    hard_norm: torch.Tensor | None = None
    signal: torch.Tensor | None = None

    @classmethod
    def from_rows(cls, rows: tuple[torch.Tensor, ...]) -> TokenStatistics:
        """Take apart what a pass returns: the six that there always are, then the signal or both norms or neither."""
        if len(rows) == 7:
            return cls(*rows[:6], signal=rows[6])
        return cls(*rows)

    @classmethod
    def joined(cls, parts: list[TokenStatistics], numbers: list[torch.Tensor]) -> TokenStatistics:
        """Put the statistics of groups of tokens back into the order of the tokens.

        Args:
            parts: the statistics of each group.
            numbers: int64 ``[tokens of the group]``: which tokens they are; together every token once.
        """
        order = torch.cat(numbers).argsort()
        joined: dict[str, Any] = {}
        for item in fields(cls):
            columns = [getattr(part, item.name) for part in parts]
            joined[item.name] = None if columns[0] is None else torch.cat(columns)[order]
        return cls(**joined)


def same_prediction(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Return where no student logit is above that of the teacher's most probable entry, bool `[tokens]`."""
    best = teacher_logits.argmax(-1, keepdim=True)
    return student_logits.gather(-1, best).squeeze(-1) == student_logits.amax(-1)


@torch.no_grad()
def token_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    difficulty: torch.Tensor,
    hard: torch.Tensor,
) -> TokenStatistics:
    """Compute the statistics from logits `[tokens, vocab]`, float32 or 64, and labels, difficulty, hard `[tokens]`."""
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return TokenStatistics(
        difficulty=difficulty,
        hard=hard.to(difficulty.dtype),
        ce=cross_entropy(log_q, labels),
        teacher_kl=kl_divergence(log_p, log_q),
        teacher_ce=cross_entropy(log_p, labels),
        agreement=same_prediction(student_logits, teacher_logits).to(difficulty.dtype),
    )
