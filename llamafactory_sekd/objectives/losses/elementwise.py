"""Divergences `Σ D(t, s)` over the vocabulary: value and pull `s ∂D/∂s`, up to a multiple of `s`.

`t` is the target and `s` the student or its proxy. A multiple of `s` in the pull has no effect, because it cancels in
`q (u - Σ q u)`. Every function takes a pair, the side with its parameters, and whether a pull is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch

from llamafactory_sekd.formula import Side
from llamafactory_sekd.objectives.compiling import may_look, row_sums
from llamafactory_sekd.objectives.losses.closed_forms import HUGE, add_at_labels, difficulty


def _lazily(function: Callable[[Any], torch.Tensor]) -> Any:
    """Return a property that is computed once; torch.compile cannot see through the lock of `cached_property`."""
    name = function.__name__

    @wraps(function)
    def read(self: Any) -> torch.Tensor:
        # Target and proxy serve every divergence of a sum; a dictionary, since torch.compile follows it.
        if name not in self.computed:
            self.computed[name] = function(self)
        return self.computed[name]

    return property(read)


class Pair:
    """A target and a student, `[rows, vocab]`, with the logarithms that do not underflow.

    Args:
        p, q: teacher and student.
        log_p, log_q, log_ratio: return `log p`, `log q` and `log p - log q`, finite, each plus a number, in a new
            matrix; called when they are needed, since most divergences need none of them.
        labels: the ground truth, `[rows, 1]`.
        ce: `-log q` of the ground truth, `[rows]`.
        kl: `KL(p ‖ q)` where it is known, `[rows]`.
        kd_lambda: the teacher's share of the target.
        skew: the student's share of the proxy.
    """

    def __init__(
        self,
        p: torch.Tensor,
        q: torch.Tensor,
        log_p: Callable[[float], torch.Tensor],
        log_q: Callable[[float], torch.Tensor],
        log_ratio: Callable[[float], torch.Tensor],
        labels: torch.Tensor,
        ce: torch.Tensor,
        kl: torch.Tensor | None,
        *,
        kd_lambda: float,
        skew: float,
    ) -> None:
        # Functions and not matrices: each is a pass over the vocabulary, and most divergences read none of them.
        self.p, self.q, self.ce, self.kl = p, q, ce, kl
        self._log_p, self._log_q, self._log_ratio = log_p, log_q, log_ratio
        self.labels, self.kd_lambda, self.skew = labels, kd_lambda, skew
        self.tiny = torch.finfo(q.dtype).tiny
        self.computed: dict[str, torch.Tensor] = {}

    @_lazily
    def t(self) -> torch.Tensor:
        """Return the target."""
        # At λ = 1 without a copy, so nobody may write to it.
        if self.kd_lambda >= 1.0:
            return self.p
        return add_at_labels(self.p * self.kd_lambda, self.labels, 1.0 - self.kd_lambda)

    @_lazily
    def s(self) -> torch.Tensor:
        """Return the student or its proxy."""
        return self.q if self.skew >= 1.0 else torch.lerp(self.t, self.q, self.skew)

    @_lazily
    def clamped_t(self) -> torch.Tensor:
        """Return the target, at least the smallest normal number: zero times its logarithm is then zero."""
        return self.t.clamp_min(self.tiny)

    @_lazily
    def clamped_s(self) -> torch.Tensor:
        """Return the same of the student."""
        return self.s.clamp_min(self.tiny)

    # The logarithms are computed for whoever asks and belong to them: a pass in place spares a new matrix.

    def log_t(self) -> torch.Tensor:
        """Return the target's logarithm, not below about -HUGE, in a new matrix."""
        if self.kd_lambda <= 0.0:
            return torch.full_like(self.p, -HUGE).scatter_(-1, self.labels, 0.0)
        if self.kd_lambda >= 1.0:
            return self._log_p(0.0)
        return self._log_p(math.log(self.kd_lambda)).scatter_(-1, self.labels, self._log_target_label)

    def log_s(self) -> torch.Tensor:
        """Return the logarithm of the student or its proxy, not below about -HUGE, in a new matrix."""
        return self._log_q(0.0) if self.skew >= 1.0 else self.clamped_s.log()

    def log_ratio(self) -> torch.Tensor:
        """`log t - log s`, in a new matrix."""
        if self.skew < 1.0:
            # t times what t cannot hold is nothing, and s is not below (1-α) t.
            return (self.clamped_t / self.clamped_s).log_()
        if self.kd_lambda <= 0.0:
            return self.log_t().sub_(self.log_s())
        if self.kd_lambda >= 1.0:
            return self._log_ratio(0.0)
        # By the logits and not as log(t/s): where both underflow their ratio is still exact.
        truth = self._log_target_label + self.ce.unsqueeze(-1)
        return self._log_ratio(math.log(self.kd_lambda)).scatter_(-1, self.labels, truth)

    @property
    def _log_target_label(self) -> torch.Tensor:
        return self._at_labels(self.t).log()

    def kl_to_student(self) -> torch.Tensor:
        """`KL(t ‖ s)`, `[rows]`."""
        # The statistics took KL(p ‖ q); the target differs from λ p in one entry, so no pass is needed.
        if self.skew >= 1.0 and self.kl is not None:
            return difficulty(self.kl, self.ce, self._at_labels(self.p).squeeze(-1), self.kd_lambda)
        return row_sums(self.log_ratio().mul_(self.t))

    def mixture(self, mix: float) -> torch.Tensor:
        """`m s + (1-m) t`, nowhere zero."""
        return torch.lerp(self.t, self.s, mix).clamp_min_(self.tiny)

    def _at_labels(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.gather(-1, self.labels)


# So many entries nearly always hold the head of `adaptive_kl`. Where they do not, so many times more are looked at.
HEAD_ENTRIES, HEAD_GROWTH = 64, 16


class Term(NamedTuple):
    """A divergence of every token.

    Attributes:
        value: `[rows]`.
        pull: `[rows, vocab]`, may be one of the pair's own matrices; None where it is not wanted.
        factor: of the pull: a number saves a pass over the matrix.
    """

    value: torch.Tensor
    pull: torch.Tensor | None
    factor: float = 1.0


def kl(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`Σ t log(t/s)`; infinite where s = 0 < t. `∂D/∂s = -t/s`."""
    return Term(pair.kl_to_student(), pair.t if wants_pull else None, -1.0)


def reverse_kl(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`Σ s log(s/t)`; infinite, and its slope too, where t = 0 < s. `∂D/∂s = log(s/t) + 1`."""
    weighted = pair.log_ratio().mul_(pair.s)
    return Term(-row_sums(weighted), weighted if wants_pull else None, -1.0)


def jsd(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`(1-m) Σ t log(t/M) + m Σ s log(s/M)` with `M = m s + (1-m) t`; at most log 2. `∂D/∂s = m log(s/M)`.

    For m towards 0 it is `m KL(s ‖ t)`, for m towards 1 `(1-m) KL(t ‖ s)`.
    """
    mix = side.parameter("mix")
    mixture = pair.mixture(mix)
    # Logarithms of ratios, not differences of logarithms: s and t are close to M, and the difference would cancel.
    weighted = (pair.s / mixture).clamp_min_(pair.tiny).log_().mul_(pair.s)
    targets = torch.div(pair.t, mixture, out=mixture).clamp_min_(pair.tiny).log_().mul_(pair.t)
    value = (1.0 - mix) * row_sums(targets) + mix * row_sums(weighted)
    return Term(value, weighted if wants_pull else None, mix)


def skew_reverse_kl(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`Σ s log(s/M)` with `M = m s + (1-m) t`; at most `-log m`. `∂D/∂s = log(s/M) + 1 - m s/M`."""
    mix = side.parameter("mix")
    # One quotient for the logarithm and for the slope.
    mixture = pair.mixture(mix)
    share = torch.div(pair.s, mixture, out=mixture)
    weighted = share.clamp_min(pair.tiny).log_().mul_(pair.s)
    value = row_sums(weighted)
    return Term(value, weighted.addcmul_(share, pair.s, value=-mix) if wants_pull else None)


def tvd(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`½ Σ |t - s|`, at most 1. `∂D/∂s = ½ sign(s - t)`, and 0 where they are equal."""
    difference = pair.s - pair.t
    # The sign is taken before the absolute values take the difference's place.
    pull = difference.sign().mul_(pair.s) if wants_pull else None
    return Term(0.5 * row_sums(difference.abs_()), pull, 0.5)


def hellinger(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`½ Σ (√t - √s)²`, at most 1. `∂D/∂s = ½ (1 - √(t/s))`."""
    # `s √(t/s)` as `√t √s`: no quotient, so nothing has to be kept from zero.
    root_t, root_s = pair.t.sqrt(), pair.s.sqrt()
    pull = root_t * root_s if wants_pull else None
    return Term(0.5 * row_sums(root_t.sub_(root_s).square_()), pull, -0.5)


def alpha_beta(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`-1/(ab) Σ [t^a s^b - a/(a+b) t^(a+b) - b/(a+b) s^(a+b)]`; `s ∂D/∂s = (s^(a+b) - t^a s^b) / a`.

    For `a, b ≥ 0`, not both 0. `b = 0` is `1/a² Σ [t^a log(t^a/s^a) - t^a + s^a]`, `KL(t ‖ s)` at a = 1, and `a = 0`
    the same with t and s, a and b exchanged, `KL(s ‖ t)` at b = 1.
    """
    a, b = side.parameter("alpha"), side.parameter("beta")
    log_s, log_t = pair.log_s(), pair.log_t()
    product = (log_t * a).add_(log_s, alpha=b).exp_() if a > 0.0 and b > 0.0 else None
    # By logarithms, which do not underflow: a probability of 1e-50 to the power 0.2 is 1e-10, that of zero is zero.
    powers_s, powers_t = log_s.mul_(a + b).exp_(), log_t.mul_(a + b).exp_()
    if b == 0.0:
        value = (row_sums(pair.log_ratio().mul_(powers_t)) * a - row_sums(powers_t) + row_sums(powers_s)) / a**2
        return Term(value, powers_s.sub_(powers_t) if wants_pull else None, 1.0 / a)
    if a == 0.0:
        weighted = pair.log_ratio().mul_(powers_s)
        value = (-row_sums(weighted) * b - row_sums(powers_s) + row_sums(powers_t)) / b**2
        return Term(value, weighted if wants_pull else None, -1.0)
    assert product is not None
    value = (row_sums(powers_t) * a + row_sums(powers_s) * b) / (a + b) - row_sums(product)
    return Term(value / (a * b), powers_s.sub_(product) if wants_pull else None, 1.0 / a)


def adaptive_kl(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`g KL(t ‖ s) + (1-g) KL(s ‖ t)` without a gradient through g.

    `g` is the share that the head has in `Σ |t - s|`: t's largest entries as long as they sum up to no more than
    `head`, and the largest in any case; of equal ones all or none.
    """
    # The gate between both directions is a number for each token, so one pull serves both.
    gaps = (pair.t - pair.s).abs_()
    total = row_sums(gaps)
    head_sums = _compiled_head_sums if torch.compiler.is_compiling() else _head_sums
    share = torch.where(total > 0, head_sums(gaps, pair.t, float(side.parameter("head"))) / total, 1.0)
    weighted = pair.log_ratio().mul_(pair.s)  # with t it gives both pulls, in one pass
    value = times(share, pair.kl_to_student()) + times(1.0 - share, -row_sums(weighted))
    return Term(value, weighted.lerp_(pair.t, share.unsqueeze(-1)) if wants_pull else None, -1.0)


def _sum_over_head(gaps: torch.Tensor, t: torch.Tensor, head: float, entries: int | None = None) -> torch.Tensor:
    """Add up the gaps of t's head, `[rows]`, from its largest entries, more where these do not hold it."""
    entries = min(entries or HEAD_ENTRIES, t.shape[-1])
    largest, places = _largest(t, entries)
    edge = largest.masked_fill(largest.cumsum(-1) <= head, 0.0).amax(-1, keepdim=True)  # the largest that is left out
    in_head = (largest > edge) | (largest == largest[:, :1])
    sums = row_sums(gaps.gather(-1, places) * in_head)
    if entries < t.shape[-1]:
        short = in_head[:, -1].nonzero().squeeze(-1)
        if len(short):
            sums[short] = _sum_over_head(gaps[short], t[short], head, entries * HEAD_GROWTH)
    return sums


def _largest(t: torch.Tensor, entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `t.topk(entries)`.

    The CPU's `topk` moves every entry together with its place, which takes longer than a divergence. The n largest
    entries are in the n groups of columns with the largest maxima, and maxima are cheap: only these groups are sorted.
    """
    columns = t.shape[-1]
    size = math.isqrt(columns // entries)  # about as many groups as entries in the chosen ones
    if size < 2:
        return t.topk(entries)
    groups = columns // size
    maxima = t[:, : size * groups].unflatten(-1, (size, groups)).amax(1)
    chosen = maxima.topk(entries, sorted=False).indices
    # A group's columns are a stride apart, so that the maxima are taken over rows of memory and not within them.
    steps = torch.arange(0, size * groups, groups, device=t.device)
    rest = torch.arange(size * groups, columns, device=t.device).expand(len(t), -1)
    places = torch.cat([(chosen.unsqueeze(-1) + steps).flatten(1), rest], dim=-1)
    largest, order = t.gather(-1, places).topk(entries)
    return largest, places.gather(-1, order)


def _sum_over_head_without_looking(gaps: torch.Tensor, t: torch.Tensor, head: float) -> torch.Tensor:
    """Return the same for any number of entries, by bisection: a sort takes many times as long.

    Numbers that are not negative are ordered as their bits are, so one step for each bit finds the smallest entry of
    the head exactly.
    """
    bits = t.view(torch.int64 if t.dtype == torch.float64 else torch.int32)
    largest = bits.amax(-1, keepdim=True)
    # Everything from `low` on is more than the head, nothing from `high` on is.
    low, high = torch.zeros_like(largest), largest + 1
    for _ in range(62 if t.dtype == torch.float64 else 30):  # the bits of 1.0
        middle = (low + high) // 2
        fits = row_sums(t.masked_fill(bits < middle, 0.0)).unsqueeze(-1) <= head
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return row_sums(gaps.masked_fill(bits < torch.minimum(high, largest), 0.0))


def _head_sums(gaps: torch.Tensor, t: torch.Tensor, head: float) -> torch.Tensor:
    return (_sum_over_head if may_look(gaps.device) else _sum_over_head_without_looking)(gaps, t, head)


# To torch.compile one operation: its steps would take a minute to compile, and on a CPU it looks at values.
_compiled_head_sums = torch.library.custom_op(
    "llamafactory_sekd::head_sums", _head_sums, mutates_args=(), schema="(Tensor gaps, Tensor t, float head) -> Tensor"
)
_compiled_head_sums.register_fake(lambda gaps, t, head: gaps.new_empty(gaps.shape[0]))


def times(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Multiply; a weight of zero switches a value off even where it is infinite."""
    return torch.where(weight > 0, weight * value, 0.0)


DIVERGENCES: dict[str, Callable[[Pair, Side, bool], Term]] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "hellinger": hellinger,
    "alpha_beta": alpha_beta,
    "adaptive_kl": adaptive_kl,
}
