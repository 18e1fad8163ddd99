"""From the logits of a few tokens to their statistics, loss and gradient, within a fixed set of buffers.

What follows the logits is bound by memory traffic, so it is done for a few rows at a time: on the CPU they and the
buffers then stay in the cache, elsewhere the buffers stay small next to the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch

from llamafactory_sekd.objectives.compiling import compiled, may_look, row_sums, softmax_and_norm
from llamafactory_sekd.objectives.losses.closed_forms import HUGE, INFINITE, Block, Logits, difficulty
from llamafactory_sekd.objectives.objective_settings import Settings, above_threshold


# Numbers in one buffer: 1 MiB of float32 and a dozen buffers fit a CPU's last cache, even where others use it too; 32
# MiB keep an accelerator busy for longer than it takes to launch the next kernel.
CPU_BUFFER = 2**18
ACCELERATOR_BUFFER = 2**23
BUFFERS = 6


class BlockProcessor:
    """Turns student logits into gradients in place, a block of rows at a time.

    Args:
        settings: λ, β, Γ, T and the factor of the hard loss.
        closed_form: the objective, from `losses.closed_forms`.
        vocab_size: the number of columns.
        tokens: the largest number of rows that will come at once.
        precision: float32 or float64.
        device: of the logits.
        may_be_infinite: whether logits can be `-inf`, which costs one pass more.
        wants_gradient: False in evaluation.
        compile: whether torch.compile takes an entire block; it then needs few buffers and plans them itself.
    """

    def __init__(
        self,
        settings: Settings,
        closed_form: Callable[[Block], torch.Tensor],
        *,
        vocab_size: int,
        tokens: int,
        precision: torch.dtype,
        device: torch.device,
        may_be_infinite: bool,
        wants_gradient: bool,
        compile: bool = False,
    ) -> None:
        self.settings = settings
        self.closed_form = closed_form
        self.may_be_infinite = may_be_infinite
        self.wants_gradient = wants_gradient
        numbers = CPU_BUFFER if device.type == "cpu" else ACCELERATOR_BUFFER
        self.rows = max(1, min(numbers // vocab_size, tokens))
        values = 9 if wants_gradient and settings.kd_hard_scale is not None else 7
        if settings.formula is not None:
            values = 8
        self.nothing = torch.empty(values, 0, dtype=precision, device=device)
        self._precision, self._vocab_size = precision, vocab_size
        self._block = compiled(BlockProcessor._process) if compile else BlockProcessor._process

    def process(
        self, z: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, hard: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Statistics, loss and gradient of one chunk.

        Args:
            z: student logits `[tokens, vocab]`; holds `dL/dz` of every token afterwards if a gradient is wanted.
            w: teacher logits `[tokens, vocab]`; destroyed.
            labels: class ids `[tokens]`.
            hard: bool `[tokens]` where the selection has been made already.

        Returns:
            `[7, tokens]`, for a formula `[8, tokens]`, with a factor of the hard loss and a gradient `[9, tokens]`:
            the statistics as `TokenStatistics.from_rows` takes them, then the loss. Where the teacher's logits hold
            NaN or +inf the loss and its gradient are 0 and `teacher_ce` is NaN.
        """
        blocks = (
            (z[rows], w[rows], labels[rows], None if hard is None else hard[rows]) for rows in self.split(labels)
        )
        return torch.cat([self.nothing, *(self._block(self, *block) for block in blocks)], dim=1)

    def scores(self, z: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return what a selection that spans all chunks goes by, of one chunk, `[tokens]`. May destroy the logits.

        It is the difficulty, or the signal of the formula's gate.
        """
        scores = [self.nothing[0]]
        for rows in self.split(labels):
            block = self._measure(z[rows], w[rows], labels[rows].unsqueeze(-1))
            score = block.difficulty if block.signal is None else block.signal
            scores.append(score.masked_fill(block.teacher_ce.isnan(), -math.inf))
        return torch.cat(scores)

    @cached_property
    def _kept(self) -> torch.Tensor:
        """For both logits where they have to be converted, p, q, q at T = 1, and the log ratio."""
        return self.nothing.new_empty(BUFFERS, self.rows, self._vocab_size)

    def split(self, labels: torch.Tensor) -> list[slice]:
        """Return the blocks of a chunk."""
        return [slice(start, start + self.rows) for start in range(0, len(labels), self.rows)]

    def _process(
        self, z: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, hard: torch.Tensor | None
    ) -> torch.Tensor:
        block = self._measure(z, w, labels.unsqueeze(-1))
        if hard is not None:
            block.hard = hard
        loss = self.closed_form(block)
        # NaN or +inf among the logits of the teacher: no target, so no loss and no gradient of this token.
        broken = block.teacher_ce.isnan()
        loss = loss.masked_fill(broken, 0.0)
        if self.wants_gradient:
            _clear(block.gradient, broken)
            # The caller looks for the gradient in `z`; a formula and compiled code make a tensor of their own.
            if block.gradient is not z:
                z.copy_(block.gradient)
        statistics = (
            block.difficulty,
            block.hard.to(loss.dtype),  # a formula's gate may have made it a degree
            block.ce,
            block.teacher_kl,
            block.teacher_ce,
            block.agreement,
        )
        further = [row for row in (block.signal, block.easy_norm, block.hard_norm) if row is not None]
        return torch.stack([*statistics, *further, loss])

    def _measure(self, z: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> Block:
        compiling = torch.compiler.is_compiling()
        kept = [torch.empty_like(z, dtype=self._precision) for _ in range(BUFFERS)] if compiling else self._kept
        z_copy, w_copy, p, q, plain_q, log_ratio = (buffer[: len(labels)] for buffer in kept)
        # Half-precision logits are off by more than what the softmax kernel loses.
        exact = z.dtype == z_copy.dtype or w.dtype == w_copy.dtype
        # Compiled code would carry out what is written to its inputs, and copies cost it nothing.
        z = z if z.dtype == z_copy.dtype and not compiling else z_copy.copy_(z)
        w = w if w.dtype == w_copy.dtype and not compiling else w_copy.copy_(w)
        temperature, formula = self.settings.kd_temperature, self.settings.formula

        # Everything that is at T = 1 comes first, since at another temperature the logits are divided in place.
        # An entry that is the largest of both models is the only way to reach the sum of the two largest logits; this
        # takes a fraction of the time of an argmax. (Near-ties within the rounding of the sum count as ties.)
        largest_sum = torch.add(z, w, out=plain_q).amax(-1)
        z_largest, w_largest = z.amax(-1), w.amax(-1)
        agreement = (largest_sum == z_largest + w_largest).to(z.dtype)
        log_ratio = torch.sub(w, z, out=log_ratio)
        if self.may_be_infinite:
            # -inf minus -inf is NaN: both models exclude the entry, and there is nothing to learn from it.
            log_ratio.nan_to_num_(nan=0.0, posinf=HUGE, neginf=-HUGE)
            if formula is not None:  # so that zero times a logarithm is zero
                z.clamp_min_(-HUGE)
                w.clamp_min_(-HUGE)

        student_norm, teacher_norm = softmax_and_norm(z, z_largest, q, exact), softmax_and_norm(w, w_largest, p, exact)
        ce = student_norm - _pick(z, labels)
        teacher_ce = teacher_norm - _pick(w, labels)
        if formula is not None and self.may_be_infinite:
            # The logits were clamped to HUGE above; what comes out beyond INFINITE is an infinity again.
            ce, teacher_ce = (value.masked_fill(value > INFINITE, math.inf) for value in (ce, teacher_ce))
            teacher_ce = teacher_ce.masked_fill(w_largest == -math.inf, math.nan)  # a row of -inf is no distribution
        shift = student_norm - teacher_norm
        # `w` is free for the products of the sum only where nothing reads the teacher's logits after this.
        keeps_teacher = temperature != 1.0 or formula is not None
        teacher_kl = self._kl(p, log_ratio, shift, spare=plain_q if keeps_teacher else w)
        tempered_ce, kl = ce, teacher_kl
        signal = untempered = None
        if formula is not None:
            signal = self._signal(z, w, p, q, student_norm, teacher_norm, ce, teacher_ce, agreement)
            if any(not formula.is_measured(side) for side in formula.sides):
                # At T = 1 they stay as they are until the gradient takes their place.
                untempered = (z, w) if temperature == 1.0 else (z.clone(), w.clone())
        if temperature == 1.0:
            plain_q = q
        else:
            # The buffers change names in place of a copy. Everything at T = 1 has been taken, so z and w may go.
            plain_q, q = q, plain_q
            student_norm = softmax_and_norm(z.div_(temperature), z_largest / temperature, q, exact)
            teacher_norm = softmax_and_norm(w.div_(temperature), w_largest / temperature, p, exact)
            shift = student_norm - teacher_norm
            tempered_ce = student_norm - _pick(z, labels)
            spare = w if formula is None else torch.empty_like(w)
            kl = self._kl(p, log_ratio.div_(temperature), shift, spare=spare)
        target_kl = difficulty(kl, tempered_ce, _pick(p, labels), self.settings.kd_lambda)
        score, logits = None, None
        if formula is not None:
            signal = target_kl if signal is None else signal
            score = signal if formula.gate is None else formula.gate.sign * signal
            logits = Logits(z, w, student_norm, teacher_norm, untempered)
        return Block(
            settings=self.settings,
            wants_gradient=self.wants_gradient,
            labels=labels,
            p=p,
            q=q,
            plain_q=plain_q,
            log_ratio=log_ratio,
            shift=shift,
            gradient=z,
            spare=w,
            difficulty=target_kl,
            kl=kl,
            ce=ce,
            teacher_kl=teacher_kl,
            teacher_ce=teacher_ce,
            agreement=agreement,
            hard=above_threshold(target_kl if score is None else score, self.settings.kd_gamma),
            signal=signal,
            logits=logits,
        )

    def _signal(
        self,
        z: torch.Tensor,
        w: torch.Tensor,
        p: torch.Tensor,
        q: torch.Tensor,
        z_norm: torch.Tensor,
        w_norm: torch.Tensor,
        ce: torch.Tensor,
        teacher_ce: torch.Tensor,
        agreement: torch.Tensor,
    ) -> torch.Tensor | None:
        """Return what the formula's gate looks at, at T = 1, `[rows]`; None where that is the difficulty."""
        gate = self.settings.formula.gate if self.settings.formula is not None else None
        match None if gate is None else gate.signal:
            case "teacher_probability":
                return torch.exp(-teacher_ce)
            case "student_probability":
                return torch.exp(-ce)
            case "teacher_entropy":
                return (w_norm - row_sums(p * w)).clamp_min(0.0)
            case "student_entropy":
                return (z_norm - row_sums(q * z)).clamp_min(0.0)
            case "hellinger":
                return (1.0 - row_sums((p * q).sqrt_())).clamp_min(0.0).sqrt()
            case "agreement":
                return agreement
        return None

    def _kl(self, p: torch.Tensor, log_ratio: torch.Tensor, shift: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
        """`KL(p ‖ q) = Σ p (log p - log q)`, `[rows]`."""
        kl = row_sums(torch.mul(p, log_ratio, out=spare)) + shift
        return kl.masked_fill_(kl > INFINITE, math.inf) if self.may_be_infinite else kl


def _clear(gradient: torch.Tensor, rows: torch.Tensor) -> None:
    """Set rows to zero; where a look costs nothing it spares the pass."""
    if not may_look(gradient.device) or bool(rows.any()):
        gradient.masked_fill_(rows.unsqueeze(-1), 0.0)


def _pick(matrix: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return matrix.gather(-1, labels).squeeze(-1)
