"""One pass over the tokens of a batch: logits, statistics and gradients of a chunk at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from llamafactory_sekd.objectives.blocks import BlockProcessor
from llamafactory_sekd.objectives.linear_head import Head, HeadGradients, LogitsSource
from llamafactory_sekd.objectives.losses.closed_forms import Block
from llamafactory_sekd.objectives.objective_settings import Settings
from llamafactory_sekd.objectives.selection import select_hard, share_threshold


class Sweep:
    """Goes once through the tokens of a batch.

    A gate by share knows its hard tokens only when all have been seen. The pass therefore takes those above the score
    (the difficulty for `self_evolution_topk`) that the share had among the tokens before, and in the end does the few
    again that it took wrongly, so that the result is that of the exact selection.

    Args:
        student, teacher: where the logits come from.
        labels: class ids `[tokens]`.
        settings: the objective's keys.
        closed_form: the objective, from `losses.closed_forms`.
        chunk_size: tokens whose logits exist at a time.
        may_be_infinite: whether logits can be `-inf`.
        gradients: where the gradients go, None where none are wanted.
        compile: whether what follows the logits is compiled.
    """

    def __init__(
        self,
        student: Head,
        teacher: LogitsSource,
        labels: torch.Tensor,
        settings: Settings,
        closed_form: Callable[[Block], torch.Tensor],
        *,
        chunk_size: int,
        may_be_infinite: bool,
        gradients: HeadGradients | None,
        compile: bool,
    ) -> None:
        self.student, self.teacher, self.labels = student, teacher, labels
        self.settings = settings
        self.gradients = gradients
        self.chunk = min(chunk_size, len(labels))
        vocab_size, device = teacher.vocab_size, labels.device
        rows = max(self.chunk, 2)  # a token that is done again needs two
        self.student_logits = torch.empty(rows, vocab_size, dtype=student.dtype, device=device)
        self.teacher_logits = torch.empty(rows, vocab_size, dtype=teacher.dtype, device=device)
        self.processor = BlockProcessor(
            settings,
            closed_form,
            vocab_size=vocab_size,
            tokens=self.chunk,
            precision=torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32),
            device=device,
            # Beyond 65,504 float16 has only infinity.
            may_be_infinite=may_be_infinite or torch.float16 in (student.dtype, teacher.dtype),
            wants_gradient=gradients is not None,
            compile=compile,
        )

    def run(self) -> torch.Tensor:
        """Return what `BlockProcessor.process` returns, of all tokens: `[7 to 9, tokens]`."""
        by_share = self.settings.share is not None and len(self.labels) > 0
        seen = self._sample() if by_share else None
        # So that a batch without response tokens gives rows of length zero and not an error.
        results = [self.processor.nothing]
        for start in range(0, len(self.labels), max(self.chunk, 1)):
            if seen is not None:
                self._guess(seen)
            tokens = slice(start, start + self.chunk)
            z, w = self._logits(tokens)
            results.append(self.processor.process(z, w, self.labels[tokens]))
            # The pass has left the gradient in the place of the logits.
            if self.gradients is not None:
                self.gradients.add(tokens, z)
            if seen is not None:
                # With every chunk the guess rests on more tokens, and fewer have to be done again.
                seen = torch.cat([self._scores(values) for values in results])
        values = torch.cat(results, dim=1)
        if by_share:
            self._correct(values)
        return values

    def _logits(self, tokens: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of student and teacher, in the first rows of the buffers."""
        return self.student.logits(tokens, self.student_logits), self.teacher.logits(tokens, self.teacher_logits)

    def _sample(self) -> torch.Tensor:
        """Return the scores of the first tokens."""
        tokens = slice(0, sample_size(self.chunk))
        return self.processor.scores(*self._logits(tokens), self.labels[tokens])

    def _guess(self, seen: torch.Tensor) -> None:
        assert self.settings.share is not None
        self.processor.settings = replace(self.settings, kd_gamma=share_threshold(seen, self.settings.share))

    def _correct(self, values: torch.Tensor) -> None:
        """Put right, in `values` and in the gradients, the tokens that were taken for hard or easy and are not."""
        hard = select_hard(self._scores(values), self.settings)
        wrong = (hard != values[1].bool()).nonzero().squeeze(-1)
        if len(wrong) == 0:
            return
        # Each of these tokens is there twice, as it was taken and as it should have been, so half as many fit.
        for rows in wrong.split(max(self.chunk // 2, 1)):
            z, w = self._logits(rows)
            again = slice(len(rows), 2 * len(rows))
            z_again, w_again = self.student_logits[again].copy_(z), self.teacher_logits[again].copy_(w)
            # The wrong gradient once more, to the last bit, so that subtracting it leaves nothing behind.
            self.processor.process(z, w, self.labels[rows], ~hard[rows])
            values[:, rows] = self.processor.process(z_again, w_again, self.labels[rows], hard[rows])
            if self.gradients is not None:
                self.gradients.replace(rows, before=z, after=z_again)

    def _scores(self, values: torch.Tensor) -> torch.Tensor:
        """Of tokens whose teacher is broken the smallest there is, so that they are no hard ones."""
        scores = values[0] if self.settings.formula is None else values[6]
        return scores.masked_fill(values[4].isnan(), -torch.inf)


def sample_size(chunk: int) -> int:
    """How many tokens to look at, to guess the threshold of the first chunk.

    To look at n of them costs 0.6 n times the products of a token; the guess is then wrong for about 0.4 chunk / √n,
    and to do one of these again costs about 1.5 times. The sum is least where n is 0.6 chunk^(2/3).
    """
    return math.ceil(0.6 * chunk ** (2 / 3))
