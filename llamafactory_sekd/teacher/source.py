"""What the trainer asks of a teacher, wherever its answers come from, and several of them as one.

Each of several answers its own examples, or the mean of those that know an example does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch

from llamafactory_sekd.objectives import IDENTITY, Head, LogitsSource, LogitTransform, product_type
from llamafactory_sekd.ranks import on_any_rank


Answers = Callable[[int | None], AbstractContextManager[LogitsSource]]


class TeacherSource(Protocol):
    """A teacher that is computed now, or read from a cache. The defaults are those of one alone that needs no notice.

    Attributes:
        collated_keys: entries of a batch that are the teacher's alone; the student must not see them.
        names: of the teachers that this one consists of; none where it is one alone.
        is_sharded: whether all ranks have to ask it together.
    """

    collated_keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    is_sharded: bool = False

    def announce(self, batches: Sequence[dict[str, Any]]) -> None:
        """Take note of batches, labels included, that :meth:`answers` will be asked about; they may gain entries."""
        return

    def can_answer_in_chunks(self, inputs: dict[str, Any]) -> bool:
        """Whether :meth:`answers` works: the logits of a few tokens can be had without those of all."""

    def logits(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Teacher logits ``[tokens, vocab]`` at the response positions.

        Args:
            inputs: the batch as it was collated, without labels.
            rows: ``[batch, length]`` bool, from :func:`llamafactory_sekd.objectives.response_positions`.
        """

    def answers(self, inputs: dict[str, Any], rows: torch.Tensor) -> Answers:
        """Compute or fetch what the teacher has to say on the response positions.

        Returns:
            A function from the size of the common vocabulary (None for the teacher's own) to a context in which the
            logits can be read, a few tokens at a time; a sharded head is gathered inside of it.
        """

    def who_answers(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Return which of the teachers in `names` have a say on each response token, bool ``[tokens, names]``."""
        return rows.new_empty(int(rows.sum()), 0)


def every_logit(source: LogitsSource, device: torch.device | None = None) -> torch.Tensor:
    """Return the logits of all tokens at once, ``[tokens, vocab]``."""
    out = torch.empty(len(source), source.vocab_size, dtype=source.dtype, device=device)
    return source.logits(slice(None), out)


def product(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vocab_size: int | None,
    transform: LogitTransform = IDENTITY,
) -> LogitsSource:
    """Logits as products of hidden states ``[tokens, width]`` with a head, over its first ``vocab_size`` rows."""
    used = len(weight) if vocab_size is None else vocab_size
    return Head(hidden, weight, bias, used, product_type(weight), transform)


Collate = Callable[[list[dict[str, Any]]], Any]


class WrappedCollator(ABC):
    """Wraps a collator, in the workers of the data loader too.

    Args:
        collate: the host's collator; it may change the features, so what a subclass takes from them it takes before.
    """

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __getattr__(self, name: str) -> Any:
        # The host asks its collator for the template and the like. While a worker unpickles one, `collate` is not set.
        if name.startswith("__") or name == "collate":
            raise AttributeError(name)
        return getattr(self.collate, name)

    @abstractmethod
    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Collate as the host does, and add the teacher's entries."""


TEACHER_NUMBER = "teacher_number"  # int64 [batch], in a batch: the number of each example's data set
# A batch of these alone can be parted by example; what belongs to images cannot.
_BY_EXAMPLE = {"input_ids", "attention_mask", "position_ids"}


class MixedLogits:
    """The logits of a batch's tokens, of which each source knows some.

    Where several sources know a token, its distribution is their weighted mean, ``log Σ w p``; the weights of the
    sources that know it are scaled to a sum of one.

    Args:
        sources: over the same vocabulary; each holds the tokens that it knows, in the order of the batch.
        knows: bool ``[tokens, sources]``; every token is known to at least one.
        weights: one per source, positive; None for equal ones.
    """

    def __init__(
        self, sources: Sequence[LogitsSource], knows: torch.Tensor, weights: Sequence[float] | None = None
    ) -> None:
        self.sources = sources
        self.knows = knows
        self.places = knows.long().cumsum(0) - 1  # a token's number among those of a source
        self.is_mixed = bool((knows.sum(-1) > 1).any())
        self.vocab_size = sources[0].vocab_size
        self.dtype = torch.float32 if self.is_mixed else sources[0].dtype
        for source in sources:
            self.dtype = torch.promote_types(self.dtype, source.dtype)

        self.may_be_infinite = any(source.may_be_infinite for source in sources)
        shares = knows * torch.tensor(list(weights or [1.0] * len(sources)), dtype=torch.float32, device=knows.device)
        self.log_shares = (shares / shares.sum(-1, keepdim=True)).log()

    def __len__(self) -> int:
        return len(self.knows)

    def logits(self, tokens: slice | torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the logits of some tokens to the first rows of `out`, `[chunk, vocab]`, and return these rows."""
        knows, places = self.knows[tokens], self.places[tokens]
        out = out[: len(knows)]
        if self.is_mixed:
            out.fill_(-torch.inf)

        for number, source in enumerate(self.sources):
            here = knows[:, number].nonzero().squeeze(-1)
            if len(here) == 0:
                continue
            if len(here) == len(out) and not self.is_mixed and source.dtype == out.dtype:
                return source.logits(places[:, number], out)  # no copy where a chunk has one teacher
            logits = source.logits(places[here, number], out.new_empty(len(here), self.vocab_size, dtype=source.dtype))
            if not self.is_mixed:
                out[here] = logits.to(out.dtype)
                continue
            share = self.log_shares[tokens][here, number].unsqueeze(-1)
            out[here] = torch.logaddexp(out[here], logits.to(out.dtype).log_softmax(-1) + share.to(out.dtype))

        return out


class SeveralTeachers(TeacherSource):
    """Asks about each example the teacher of its data set; see :class:`TeacherSource`.

    Args:
        teachers: the models, each once.
        names: of the data sets.
        numbers: of each data set's teacher, its place in `teachers`.
    """

    collated_keys = (TEACHER_NUMBER,)

    def __init__(self, teachers: Sequence[Any], names: Sequence[str], numbers: Sequence[int]) -> None:
        self.teachers = teachers
        self.names = tuple(names)
        self.numbers = torch.tensor(list(numbers))

    def can_answer_in_chunks(self, inputs: dict[str, Any]) -> bool:
        """Whether all of them can; each looks at itself, so none is left out."""
        plain = _without_numbers(inputs)
        can = [teacher.can_answer_in_chunks(plain) for teacher in self.teachers]
        return all(can)

    def logits(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Logits ``[tokens, vocab]``, over as many ids as all of the teachers that were asked have."""
        knows = self._who(inputs, rows)
        parts = self._of_each(inputs, rows, lambda teacher, batch, wanted: teacher.logits(batch, wanted))
        vocab_size = min(part.shape[-1] for _, part in parts)
        out = parts[0][1].new_empty(len(knows), vocab_size)
        for number, part in parts:
            out[knows[:, number]] = part[:, :vocab_size].to(out.dtype)
        return out

    def answers(self, inputs: dict[str, Any], rows: torch.Tensor) -> Answers:
        """One forward pass of each teacher that has an example in the batch."""
        knows = self._who(inputs, rows)
        parts = self._of_each(inputs, rows, lambda teacher, batch, wanted: teacher.answers(batch, wanted))
        known = knows[:, [number for number, _ in parts]]

        @contextmanager
        def opened(vocab_size: int | None) -> Iterator[LogitsSource]:
            with ExitStack() as heads:
                sources = [heads.enter_context(answer(vocab_size)) for _, answer in parts]
                yield sources[0] if len(sources) == 1 else MixedLogits(sources, known)

        return opened

    def who_answers(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Of which data set each response token is, bool ``[tokens, data sets]``."""
        return _per_token(inputs[TEACHER_NUMBER], rows, len(self.names))

    def _who(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Return which teacher answers each response token, bool ``[tokens, teachers]``."""
        return _per_token(self._teacher_of(inputs), rows, len(self.teachers))

    def _teacher_of(self, inputs: dict[str, Any]) -> torch.Tensor:
        numbers = inputs[TEACHER_NUMBER]
        return self.numbers.to(numbers.device)[numbers]

    def _of_each(
        self,
        inputs: dict[str, Any],
        rows: torch.Tensor,
        ask: Callable[[TeacherSource, dict[str, Any], torch.Tensor], Any],
    ) -> list[tuple[int, Any]]:
        """Ask each teacher about its examples, and return the numbers of those that were asked with what they said.

        A teacher without an example here reads the first one, for nothing, where its weights are shared out: all
        ranks gather them together.
        """
        plain, of_row = _without_numbers(inputs), self._teacher_of(inputs)
        found = []
        for number, teacher in enumerate(self.teachers):
            own = of_row == number
            asked = own.any()
            if not (on_any_rank(asked) if teacher.is_sharded else bool(asked)):
                continue
            examples = own.nonzero().squeeze(-1) if bool(asked) else own.new_zeros(1, dtype=torch.int64)
            wanted = rows & own.unsqueeze(-1)
            if set(plain) <= _BY_EXAMPLE and all(len(value) == len(rows) for value in plain.values()):
                part = {name: value[examples] for name, value in plain.items()}
                found.append((number, ask(teacher, part, wanted[examples])))
            else:
                found.append((number, ask(teacher, plain, wanted)))

        return found


class NumberCollator(WrappedCollator):
    """Wraps a collator: the numbers of the examples' data sets travel next to what the host puts together."""

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Collate as the host does and add the numbers."""
        numbers = [feature[TEACHER_NUMBER] for feature in features]
        batch = self.collate([_without_numbers(feature) for feature in features])
        batch[TEACHER_NUMBER] = torch.tensor(numbers, dtype=torch.int64)
        return batch


def _without_numbers(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != TEACHER_NUMBER}


def _per_token(numbers: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return bool ``[tokens, count]`` from a number for each row, ``[batch]``."""
    of_token = numbers.to(rows.device)[rows.nonzero()[:, 0]]
    return of_token.unsqueeze(-1) == torch.arange(count, device=rows.device)
