"""A language-model head as the fused objective sees it: logits of a few tokens in, gradients of a few tokens back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from llamafactory_sekd.objectives import head_products


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the products of its head: ``cap · tanh(scale · product / cap)``.

    Cohere and Granite only scale their logits (no cap), Gemma 2 caps them.
    """

    scale: float = 1.0
    cap: float | None = None


IDENTITY = LogitTransform()


class LogitsSource(Protocol):
    """Something that knows the logits of every response token, and writes them out a few tokens at a time.

    Attributes:
        vocab_size: the number of logits of a token.
        dtype: the type that they are best written in.
        may_be_infinite: whether a logit can be `-inf`.
    """

    vocab_size: int
    dtype: torch.dtype
    may_be_infinite: bool

    def __len__(self) -> int:
        """Return the number of tokens."""

    def logits(self, tokens: slice | torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the logits of some tokens to the first rows of `out`, `[chunk, vocab]`, and return these rows.

        The tokens are a slice or their numbers, int64.
        """


class Head:
    """`logits = transform(hidden · weightᵀ + bias)` over the first `vocab_size` rows of the weight.

    Args:
        hidden: `[tokens, width]`.
        weight: `[vocab, width]`; cut without a copy, copied only where autocast's type is narrower.
        bias: `[vocab]` or None.
        vocab_size: the number of rows that are used.
        dtype: the type of the products, see `product_type`.
        transform: what the model does to the products.
        keeps_slope: whether the cap's derivative at the last logits is kept, for :meth:`through_transform`.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        vocab_size: int,
        dtype: torch.dtype,
        transform: LogitTransform = IDENTITY,
        *,
        keeps_slope: bool = False,
    ) -> None:
        # Detached: the products write to buffers, which autograd would have to record.
        self.hidden = hidden.detach()
        self.transform = transform
        self._keeps_slope = keeps_slope and transform.cap is not None
        self._slope: torch.Tensor | None = None
        self.vocab_size = vocab_size
        self.may_be_infinite = bias is not None
        self.dtype = dtype
        # A copy of a head takes as much memory as the head: only autocast asks for one.
        is_narrow = weight.dtype.itemsize < dtype.itemsize  # then the products convert it, a tile at a time
        self.weight = weight.detach()[:vocab_size].to(weight.dtype if is_narrow else dtype)
        # Hidden states and bias take the scale, so the products come out scaled.
        self.bias = None if bias is None else bias.detach()[:vocab_size].to(dtype) * transform.scale
        self.bias_type = None if bias is None else bias.dtype

    def __len__(self) -> int:
        return len(self.hidden)

    def rows(self, tokens: slice | torch.Tensor) -> torch.Tensor:
        """Return the hidden states of some tokens, scaled, in the type of the products."""
        rows = self.hidden[tokens].to(self.dtype)
        # Scaled here, the scale never meets the vocabulary: neither the logits nor their gradient take a pass for it.
        return rows if self.transform.scale == 1.0 else rows * self.transform.scale

    def logits(self, tokens: slice | torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the logits of some tokens to the first rows of `out`, `[chunk, vocab]`, and return these rows."""
        hidden = self.rows(tokens)
        logits = head_products.logits(hidden, self.weight, self.bias, out=out[: len(hidden)])
        cap = self.transform.cap
        # In place: a second buffer of the size of a chunk's logits would double what the chunk takes.
        if cap is not None:
            logits.div_(cap).tanh_()
            if self._keeps_slope:
                # The objective overwrites the logits with their gradient, so what it needs of them is kept now.
                if self._slope is None or len(self._slope) < len(logits):
                    self._slope = torch.empty_like(out)
                torch.addcmul(logits.new_ones(()), logits, logits, value=-1, out=self._slope[: len(logits)])
            logits.mul_(cap)
        return logits

    def through_transform(self, gradient: torch.Tensor) -> torch.Tensor:
        """Turn the gradient of the last logits, in place, into that of what the cap was given."""
        return gradient if self._slope is None else gradient.mul_(self._slope[: len(gradient)])


class SomeTokens:
    """The logits of some of a source's tokens.

    Args:
        source: the logits of all tokens.
        numbers: int64 ``[some]``, which of them.
    """

    def __init__(self, source: LogitsSource, numbers: torch.Tensor) -> None:
        self.source = source
        self.numbers = numbers
        self.vocab_size = source.vocab_size
        self.dtype = source.dtype
        self.may_be_infinite = source.may_be_infinite

    def __len__(self) -> int:
        return len(self.numbers)

    def logits(self, tokens: slice | torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the logits of some tokens to the first rows of `out`, `[chunk, vocab]`, and return these rows."""
        return self.source.logits(self.numbers[tokens], out)


# Up to here rounding the sum costs no more than rounding the result does.
FEW_CHUNKS = 8


# Copied at once where rows move up within a matrix: a few MiB.
MOVED_ROWS = 8


class HeadGradients:
    """The gradients of a head's three inputs, each only where it is wanted, summed up chunk by chunk.

    The gradient of a bfloat16 weight is summed in float32 where more than `FEW_CHUNKS` are added up and memory allows:
    each addition in bfloat16 rounds the sum (against float64: 2e-3 for one chunk, 3e-2 for 400). That of a float16
    weight always is, because the sum over the tokens can leave float16's range. The gradient of the hidden states is
    kept without the factor 1 / num_items until the backward pass, where a loss scale meets it before it can underflow.

    Args:
        head: the student's head.
        weight: its complete weight, uncut and uncast: the shape and type of the gradient.
        wants: whether the gradients of hidden states, weight and bias are needed.
        num_items: the divisor of the loss.
        chunks: how many parts the tokens come in.
    """

    def __init__(
        self,
        head: Head,
        weight: torch.Tensor,
        wants: tuple[bool, ...],
        num_items: float | torch.Tensor,
        chunks: int,
    ) -> None:
        self.head = head
        self.num_items = num_items
        # A divisor that is known here costs nothing inside the products; a tensor would have to be waited for.
        self.scale = 1.0 if isinstance(num_items, torch.Tensor) else 1.0 / num_items
        self.types = (head.hidden.dtype, weight.dtype, head.bias_type)
        self.hidden = self.weight = self.bias = None
        if wants[0]:
            # In the type of the products: one rounding at the end in place of one per use.
            self.hidden = torch.empty_like(head.hidden, dtype=head.dtype)
        # The entries beyond the common vocabulary keep this zero, which is their gradient.
        if wants[1]:
            self.weight = torch.zeros(weight.shape, dtype=_summing_type(weight, chunks), device=weight.device)
        if wants[2]:
            summing = torch.promote_types(weight.dtype, torch.float32)
            self.bias = torch.zeros(len(weight), dtype=summing, device=weight.device)

    def add(self, tokens: slice, gradient: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Take in the gradient of the logits of some tokens.

        Args:
            tokens: which they are.
            gradient: `[chunk, vocab]`, in the type of the products; destroyed.
            rows: int64, ascending, which of them have a gradient, where the others have none; None for all.
        """
        gradient = self.head.through_transform(gradient)
        if rows is not None:
            self._add_some(tokens, gradient, rows)
            return
        if self.hidden is not None:
            head_products.hidden_gradient(gradient, self.head.weight, out=self.hidden[tokens])
        self._add_head(gradient, tokens)

    def _add_some(self, tokens: slice, gradient: torch.Tensor, rows: torch.Tensor) -> None:
        # In place, a few at a time: no row is overwritten before it has been moved up, since none moves down.
        for start in range(0, len(rows), MOVED_ROWS):
            moved = rows[start : start + MOVED_ROWS]
            gradient[start : start + len(moved)] = gradient[moved]
        gradient = gradient[: len(rows)]
        if self.hidden is not None:
            part = self.hidden.new_empty(len(rows), self.hidden.shape[1])
            head_products.hidden_gradient(gradient, self.head.weight, out=part)
            self.hidden[tokens].zero_().index_copy_(0, rows, part)
        self._add_head(gradient, rows + tokens.start)

    def replace(self, tokens: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take out the gradient `before` of the logits of some tokens, given by their numbers, and take in `after`."""
        before, after = self.head.through_transform(before), self.head.through_transform(after)
        if self.hidden is not None:
            out = torch.empty_like(self.hidden[tokens])
            self.hidden[tokens] = head_products.hidden_gradient(after, self.head.weight, out=out)
        # One product of the difference in place of one that takes out and one that takes in.
        self._add_head(torch.sub(after, before, out=before), tokens)

    def finish(self, grad_loss: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the gradients of hidden states, weight and bias for the gradient of the loss, once."""
        per_token = grad_loss / self.num_items
        summed = grad_loss if self.scale != 1.0 else per_token
        scale = self.head.transform.scale
        # The head's gradient has met the scale in the hidden states, and the divisor in the products.
        factors = (per_token * scale, summed, summed * scale)
        totals = (self.hidden, self.weight, self.bias)
        return [
            None if total is None else _multiply(total, factor).to(dtype)
            for total, factor, dtype in zip(totals, factors, self.types, strict=True)
        ]

    def _add_head(self, gradient: torch.Tensor, tokens: slice | torch.Tensor) -> None:
        vocab_size = gradient.shape[1]
        if self.weight is not None:
            used, hidden = self.weight[:vocab_size], self.head.rows(tokens)
            head_products.add_weight_gradient(used, gradient, hidden, scale=self.scale)
        if self.bias is not None:
            self.bias[:vocab_size].add_(gradient.sum(0, dtype=self.bias.dtype), alpha=self.scale)


def _summing_type(weight: torch.Tensor, chunks: int) -> torch.dtype:
    if weight.dtype != torch.bfloat16 or chunks <= FEW_CHUNKS:
        return torch.float32 if weight.dtype == torch.float16 else weight.dtype
    free = head_products.free_memory(weight.device)
    # The sum and, at the end, its copy in bfloat16.
    fits = free is None or free > 2 * weight.numel() * torch.float32.itemsize
    return torch.float32 if fits else torch.bfloat16


def _multiply(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """In place; on the CPU a factor of one costs no pass, elsewhere looking at it would cost a synchronization."""
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return tensor
    return tensor.mul_(factor)
