"""One pass over the tokens of a batch: logits, statistics and gradients of a chunk at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from llamafactory_sekd.objectives.blocks import BlockProcessor
from llamafactory_sekd.objectives.compiling import may_look
from llamafactory_sekd.objectives.linear_head import Head, HeadGradients, LogitsSource
from llamafactory_sekd.objectives.losses.closed_forms import Block
from llamafactory_sekd.objectives.objective_settings import Settings, ShareGuess, select_hard


class Sweep:
    """Goes once through the tokens of a batch.

    A gate by share knows its hard tokens only when all have been seen. The pass therefore takes those above the score
    (the difficulty for `self_evolution_topk`) that the share had among the tokens before, and in the end does the few
    again that it took wrongly, so that the result is that of the exact selection.

    Tokens that a gate leaves out have no gradient, and the products of the backward pass spare them.

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
        # Once for all chunks: hundreds of MiB, of which a CPU would map every page again each time.
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
        share = self.settings.share
        guess = None if share is None or len(self.labels) == 0 else ShareGuess(share, self._sample())
        # So that a batch without response tokens gives rows of length zero and not an error.
        results = [self.processor.nothing]
        for start in range(0, len(self.labels), max(self.chunk, 1)):
            tokens = slice(start, start + self.chunk)
            z, w = self._logits(tokens)
            values = self._process(z, w, self.labels[tokens], guess)
            # The pass has left the gradient in the place of the logits.
            if self.gradients is not None:
                self.gradients.add(tokens, z, self._rows_with_gradient(values[1]))
            results.append(values)
        values = torch.cat(results, dim=1)
        if guess is not None:
            self._correct(values)
        return values

    def _process(
        self, z: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, guess: ShareGuess | None
    ) -> torch.Tensor:
        """Return what `BlockProcessor.process` returns, of a chunk."""
        if guess is None:
            return self.processor.process(z, w, labels)
        results = []
        # Each block adds to what the next one's guess rests on: the products of a token taken wrongly are done again.
        for rows in self.processor.split(labels):
            self.processor.settings = replace(self.settings, kd_gamma=guess.threshold)
            results.append(self.processor.process(z[rows], w[rows], labels[rows]))
            guess.see(self._scores(results[-1]))
        return torch.cat(results, dim=1)

    def _rows_with_gradient(self, hard: torch.Tensor) -> torch.Tensor | None:
        """Return the tokens of a chunk that have a gradient, by their numbers, where one side of the gate weighs 0.

        None where that is all of them, and where to look at them would be to wait for an accelerator.
        """
        formula = self.settings.formula
        if formula is None or formula.gate is None or formula.hard is None or not may_look(hard.device):
            return None
        if formula.gate.width != 0.0 or (formula.easy.weight != 0.0 and formula.hard.weight != 0.0):
            return None
        rows = (hard.bool() ^ (formula.hard.weight == 0.0)).nonzero().squeeze(-1)
        return rows if len(rows) < len(hard) else None

    def _logits(self, tokens: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of student and teacher, in the first rows of the buffers."""
        return self.student.logits(tokens, self.student_logits), self.teacher.logits(tokens, self.teacher_logits)

    def _sample(self) -> torch.Tensor:
        """Return the scores of a few tokens, from everywhere: those next to each other are of the same sentence."""
        # Of a block and not of a chunk: from the second block on the guess rests on tokens that cost nothing more.
        number, device = sample_size(self.processor.rows), self.labels.device
        tokens = torch.arange(number, device=device) * len(self.labels) // number
        return self.processor.scores(*self._logits(tokens), self.labels[tokens])

    def _correct(self, values: torch.Tensor) -> None:
        """Put right, in `values` and in the gradients, the tokens that were taken for hard or easy and are not."""
        hard = select_hard(self._scores(values), self.settings)
        # How many they are decides the shapes that follow: here the CPU waits for an accelerator, once per batch.
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


def sample_size(block: int) -> int:
    """How many tokens to look at, to guess the threshold of the first block.

    To look at n of them costs 0.6 n times the products of a token; the guess is then wrong for about 0.4 block / √n,
    and to do one of these again costs about 1.5 times. The sum is least where n is 0.6 block^(2/3).
    """
    return math.ceil(0.6 * block ** (2 / 3))
