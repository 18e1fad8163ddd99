"""Several teachers in one batch: each token has the teacher that answers it, or the mean of those that do."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llamafactory_sekd.objectives import LogitsSource


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
