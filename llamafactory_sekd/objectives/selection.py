"""Which tokens are hard: by a threshold (the paper's Γ) or by their share of the batch (its top-K ablation)."""

from __future__ import annotations

import torch

from llamafactory_sekd.objectives.objective_settings import Settings


def above_threshold(difficulty: torch.Tensor, gamma: float | torch.Tensor) -> torch.Tensor:
    """Hard tokens are those with `d > Γ` (a token exactly at Γ is easy).

    Args:
        difficulty: `d`, `[tokens]`.
        gamma: Γ, a number or a 0-dimensional tensor; `inf` makes every token easy, a negative value every token hard.

    Returns:
        bool `[tokens]`.
    """
    return difficulty > gamma


def largest_share(difficulty: torch.Tensor, share: float) -> torch.Tensor:
    """Hard tokens are the `share` of the batch with the largest `d`.

    Their number is `share · tokens`, rounded to the nearest integer and half up. Of tokens that are equally difficult
    the earlier one is taken first, so that the result does not depend on the device's sorting.

    Args:
        difficulty: `d`, `[tokens]`.
        share: the share of hard tokens, in `[0, 1]`.

    Returns:
        bool `[tokens]`.
    """
    number = min(int(share * len(difficulty) + 0.5), len(difficulty))
    order = torch.sort(difficulty, descending=True, stable=True).indices
    hard = torch.zeros_like(difficulty, dtype=torch.bool)
    hard[order[:number]] = True
    return hard


class ShareGuess:
    """The score above which a share of the tokens is, guessed from those that have been seen.

    Args:
        share: of the tokens that are hard.
        sample: scores of a few tokens, `[some]`, forgotten when others have been seen.

    Attributes:
        threshold: 0-dimensional.
    """

    def __init__(self, share: float, sample: torch.Tensor) -> None:
        self.share, self.threshold = share, _share_threshold(sample, share)
        self._scores: list[torch.Tensor] = []
        self._seen = self._rests_on = 0

    def see(self, scores: torch.Tensor) -> None:
        """Take in the scores of further tokens."""
        self._scores.append(scores)
        self._seen += len(scores)
        # The guess from n tokens is off by 1/√n; to sort them again for a few more would gain nothing.
        if self._seen > 1.1 * self._rests_on:
            self.threshold, self._rests_on = _share_threshold(torch.cat(self._scores), self.share), self._seen


def _share_threshold(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Return a score above which about this share of these tokens is, 0-dimensional."""
    number = int(share * len(scores) + 0.5)
    # The place after the last hard token; where all are hard there is none.
    return torch.cat([scores.sort(descending=True).values, scores.new_full((1,), -torch.inf)])[number]


def select_hard(scores: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Return the selection that an objective asks for, bool `[tokens]`.

    Every objective of the paper but `self_evolution_topk` reports the tokens with `d > Γ` as hard, so that the hard
    share can be compared between objectives, also where its loss treats all tokens alike.

    Args:
        scores: the difficulty, or what a formula's gate looks at, `[tokens]`.
        settings: Γ or the share.
    """
    share = settings.share
    return above_threshold(scores, settings.kd_gamma) if share is None else largest_share(scores, share)
