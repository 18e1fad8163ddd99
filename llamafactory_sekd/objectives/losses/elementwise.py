"""Divergences `Σ D(t, s)` over the vocabulary: value and pull `s ∂D/∂s`, up to a multiple of `s`.

`t` is the target and `s` the student or its proxy. A multiple of `s` in the pull has no effect, because it cancels in
`q (u - Σ q u)`. Every function takes a pair, the side with its parameters, and whether a pull is wanted.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch

from llamafactory_sekd.errors import ArgumentError, one_line
from llamafactory_sekd.formula import Side
from llamafactory_sekd.objectives.compiling import may_look, row_sums
from llamafactory_sekd.objectives.losses.closed_forms import HUGE, add_at_labels, difficulty


def _lazily(function: Callable[[Any], torch.Tensor]) -> Any:
    """Return a property that is computed once; torch.compile cannot see through the lock of `cached_property`."""
    name = function.__name__

    @wraps(function)
    def read(self: Any) -> torch.Tensor:
        if name not in self.computed:
            self.computed[name] = function(self)
        return self.computed[name]

    return property(read)


class Pair:
    """A target and a student, `[rows, vocab]`, with the logarithms that do not underflow.

    Args:
        p, q: teacher and student.
        z, w: logits of student and teacher, at least -HUGE.
        z_norm, w_norm: such that `log q = z - z_norm` and `log p = w - w_norm`, `[rows]`.
        labels: the ground truth, `[rows, 1]`.
        kl: `KL(p ‖ q)` where it is known, `[rows]`.
        kd_lambda: the teacher's share of the target.
        skew: the student's share of the proxy.
    """

    def __init__(
        self,
        p: torch.Tensor,
        q: torch.Tensor,
        z: torch.Tensor,
        w: torch.Tensor,
        z_norm: torch.Tensor,
        w_norm: torch.Tensor,
        labels: torch.Tensor,
        kl: torch.Tensor | None,
        *,
        kd_lambda: float,
        skew: float,
    ) -> None:
        self.p, self.q, self.kl = p, q, kl
        self._z, self._w, self._z_norm, self._w_norm = z, w, z_norm.unsqueeze(-1), w_norm.unsqueeze(-1)
        self.labels, self.kd_lambda, self.skew = labels, kd_lambda, skew
        self.tiny = torch.finfo(q.dtype).tiny
        self.computed: dict[str, torch.Tensor] = {}

    @_lazily
    def t(self) -> torch.Tensor:
        """Return the target."""
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

    @_lazily
    def log_t(self) -> torch.Tensor:
        """Return the target's logarithm, not below about -HUGE."""
        if self.kd_lambda <= 0.0:
            return torch.full_like(self._w, -HUGE).scatter_(-1, self.labels, 0.0)
        log_t = self._w - (self._w_norm - math.log(self.kd_lambda))
        return log_t if self.kd_lambda >= 1.0 else log_t.scatter_(-1, self.labels, self._at_labels(self.t).log())

    @_lazily
    def log_s(self) -> torch.Tensor:
        """Return the logarithm of the student or its proxy, not below about -HUGE."""
        return self._z - self._z_norm if self.skew >= 1.0 else self.clamped_s.log()

    @_lazily
    def log_ratio(self) -> torch.Tensor:
        """`log s - log t`; may be overwritten by whoever is the last to read it."""
        if self.skew < 1.0:
            # t times what t cannot hold is nothing, and s is not below (1-α) t.
            return (self.clamped_s / self.clamped_t).log_()
        if self.kd_lambda <= 0.0:
            return self.log_s - self.log_t
        ratio = (self._z - self._w).add_(self._w_norm - self._z_norm - math.log(self.kd_lambda))
        if self.kd_lambda < 1.0:
            truth = self._at_labels(self._z) - self._z_norm - self._at_labels(self.t).log()
            ratio.scatter_(-1, self.labels, truth)
        return ratio

    def kl_to_student(self) -> torch.Tensor:
        """`KL(t ‖ s)`, `[rows]`."""
        if self.skew >= 1.0 and self.kl is not None:
            ce = (self._z_norm - self._at_labels(self._z)).squeeze(-1)
            return difficulty(self.kl, ce, self._at_labels(self.p).squeeze(-1), self.kd_lambda)
        return -row_sums(self.t * self.log_ratio)

    def mixture(self, mix: float) -> torch.Tensor:
        """`m s + (1-m) t`, nowhere zero."""
        return torch.lerp(self.t, self.s, mix).clamp_min_(self.tiny)

    def _at_labels(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.gather(-1, self.labels)


# So many entries nearly always hold the head of `adaptive_kl`; to sort all of them takes longer than everything else.
# Where they do not hold it, so many times more are looked at.
HEAD_ENTRIES, HEAD_GROWTH = 64, 16

Term = tuple[torch.Tensor, torch.Tensor | None]


def kl(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`Σ t log(t/s)`; infinite where s = 0 < t. `∂D/∂s = -t/s`."""
    return pair.kl_to_student(), pair.t.neg() if wants_pull else None


def reverse_kl(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`Σ s log(s/t)`; infinite, and its slope too, where t = 0 < s. `∂D/∂s = log(s/t) + 1`."""
    weighted = pair.s * pair.log_ratio
    return row_sums(weighted), weighted if wants_pull else None


def jsd(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`(1-m) Σ t log(t/M) + m Σ s log(s/M)` with `M = m s + (1-m) t`; at most log 2. `∂D/∂s = m log(s/M)`.

    For m towards 0 it is `m KL(s ‖ t)`, for m towards 1 `(1-m) KL(t ‖ s)`.
    """
    mix = side.parameter("mix")
    mixture = pair.mixture(mix)
    weighted = (pair.clamped_s / mixture).log_().mul_(pair.s)
    targets = mixture.reciprocal_().mul_(pair.clamped_t).log_().mul_(pair.t)
    value = (1.0 - mix) * row_sums(targets) + mix * row_sums(weighted)
    return value, weighted.mul_(mix) if wants_pull else None


def skew_reverse_kl(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`Σ s log(s/M)` with `M = m s + (1-m) t`; at most `-log m`. `∂D/∂s = log(s/M) + 1 - m s/M`."""
    mix = side.parameter("mix")
    share = pair.clamped_s / pair.mixture(mix)
    ratio = share.log()
    value = row_sums(ratio * pair.s)
    return value, ratio.sub_(share, alpha=mix).mul_(pair.s) if wants_pull else None


def tvd(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`½ Σ |t - s|`, at most 1. `∂D/∂s = ½ sign(s - t)`, and 0 where they are equal."""
    difference = pair.s - pair.t
    pull = difference.sign().mul_(pair.s).mul_(0.5) if wants_pull else None
    return 0.5 * row_sums(difference.abs_()), pull


def hellinger(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`½ Σ (√t - √s)²`, at most 1. `∂D/∂s = ½ (1 - √(t/s))`."""
    root_t, root_s = pair.t.sqrt(), pair.s.sqrt()
    pull = (root_t * root_s).mul_(-0.5) if wants_pull else None
    return 0.5 * row_sums(root_t.sub_(root_s).square_()), pull


def alpha_beta(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`-1/(ab) Σ [t^a s^b - a/(a+b) t^(a+b) - b/(a+b) s^(a+b)]`; `s ∂D/∂s = (s^(a+b) - t^a s^b) / a`.

    For `a, b ≥ 0`, not both 0. `b = 0` is `1/a² Σ [t^a log(t^a/s^a) - t^a + s^a]`, `KL(t ‖ s)` at a = 1, and `a = 0`
    the same with t and s, a and b exchanged, `KL(s ‖ t)` at b = 1.
    """
    a, b = side.parameter("alpha"), side.parameter("beta")
    powers_s = (pair.log_s * (a + b)).exp_()
    powers_t = (pair.log_t * (a + b)).exp_()
    if b == 0.0:
        value = (-row_sums(powers_t * pair.log_ratio) * a - row_sums(powers_t) + row_sums(powers_s)) / a**2
        return value, powers_s.sub_(powers_t).div_(a) if wants_pull else None
    if a == 0.0:
        weighted = powers_s * pair.log_ratio
        value = (row_sums(weighted) * b - row_sums(powers_s) + row_sums(powers_t)) / b**2
        return value, weighted if wants_pull else None
    product = (pair.log_t * a).add_(pair.log_s, alpha=b).exp_()
    value = (row_sums(powers_t) * a + row_sums(powers_s) * b) / (a + b) - row_sums(product)
    return value / (a * b), powers_s.sub_(product).div_(a) if wants_pull else None


def adaptive_kl(pair: Pair, side: Side, wants_pull: bool) -> Term:
    """`g KL(t ‖ s) + (1-g) KL(s ‖ t)` without a gradient through g.

    `g` is the share that the head has in `Σ |t - s|`: t's largest entries as long as they sum up to no more than
    `head`, at least one.
    """
    gaps = (pair.t - pair.s).abs_()
    total = row_sums(gaps)
    entries = HEAD_ENTRIES if may_look(gaps.device) else gaps.shape[-1]
    share = torch.where(total > 0, _sum_over_head(gaps, pair.t, side.parameter("head"), entries) / total, 1.0)
    forward, pull = kl(pair, side, wants_pull)
    reverse, reverse_pull = reverse_kl(pair, side, wants_pull)
    value = _times(share, forward) + _times(1.0 - share, reverse)
    if pull is None or reverse_pull is None:
        return value, None
    return value, torch.lerp(reverse_pull, pull, share.unsqueeze(-1))


def _sum_over_head(gaps: torch.Tensor, t: torch.Tensor, head: float, entries: int) -> torch.Tensor:
    """Add up the gaps of t's largest entries as long as they sum up to no more than `head`, `[rows]`."""
    entries = min(entries, t.shape[-1])
    largest, order = t.topk(entries) if entries < t.shape[-1] else t.sort(-1, descending=True)
    in_head = largest.cumsum(-1) <= head
    in_head[:, 0] = True
    sums = row_sums(gaps.gather(-1, order) * in_head)
    if entries < t.shape[-1]:
        short = (largest.sum(-1) <= head).nonzero().squeeze(-1)
        if len(short):
            sums[short] = _sum_over_head(gaps[short], t[short], head, entries * HEAD_GROWTH)
    return sums


def _times(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
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


def user_divergence(name: str, pair: Pair, wants_pull: bool) -> Term:
    """Return the sum of a user's function, with the pull by autograd, or by `<function>_derivative` of its module.

    The function gets t and s, `[rows, vocab]`, nowhere zero, and returns the value of every entry.

    Raises:
        ArgumentError: it cannot be imported, or its result has the wrong shape, is NaN or has no gradient.
    """
    function, derivative = user_function(name)
    by_autograd = wants_pull and derivative is None
    # Two of its own: whatever it does to them in place does no harm.
    target, student = pair.t.clamp_min(pair.tiny), pair.s.clamp_min(pair.tiny).detach()
    with torch.set_grad_enabled(by_autograd):
        value = _called(name, function, target, student.requires_grad_(by_autograd))
        slope = None
        if by_autograd:
            if not value.requires_grad:
                raise ArgumentError(f"`{name}` has no gradient: compute its result from the second argument, s.")
            slope = torch.autograd.grad(value.sum(), student)[0]
    if wants_pull and derivative is not None:
        slope = _called(f"{name}_derivative", derivative, target, student)
    value = value.detach()
    sums = row_sums(value)
    if may_look(value.device):
        _refuse_nan(name, value, sums, pair)
        if slope is not None:
            _refuse_nan(f"the derivative of {name}", slope, row_sums(slope), pair)
    return sums, None if slope is None else slope.detach() * pair.s


def _called(name: str, function: Callable[..., Any], target: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    value = function(target, student)
    if not isinstance(value, torch.Tensor) or value.shape != target.shape:
        shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ArgumentError(
            f"`{name}` returned {shape} for t and s of shape {list(target.shape)}: return the value of every entry; "
            "the sum over the vocabulary is taken afterwards."
        )
    return value


def _refuse_nan(name: str, value: torch.Tensor, sums: torch.Tensor, pair: Pair) -> None:
    if not bool(sums.isnan().any()):  # which nearly always spares passes over every entry
        return
    # A teacher with NaN among its logits is left out later, whatever its loss.
    wrong = value.isnan().any(-1) & ~pair.t.isnan().any(-1) & ~pair.s.isnan().any(-1)
    if bool(wrong.any()):
        raise ArgumentError(
            f"`{name}` is NaN for some t and s, which are between {pair.tiny:.0e} and 1: look for a difference of "
            "infinities, or the root or logarithm of a negative number."
        )


@cache
def user_function(name: str) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """Import `module:function`, from the working directory too.

    Returns:
        The function, and `<function>_derivative` of the same module or None.

    Raises:
        ArgumentError: it cannot be imported.
    """
    module_name, function_name = name.split(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's file raises
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ArgumentError(
            f"`{name}`: module `{module_name}` cannot be imported from {here} ({reason:.200})."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ArgumentError(f"`{name}`: `{module_name}` has no function `{function_name}`.")
    return function, getattr(module, f"{function_name}_derivative", None)


def try_user_function(name: str) -> None:
    """Call a user's function once on distributions of five entries, impossible ones among them.

    Raises:
        ArgumentError: it cannot be imported or does not do what it should.
    """
    z = torch.tensor([[2.0, 0.5, -1.0, 0.0, -1e30], [0.0, 0.0, 3.0, -1e30, 1.0]])
    w = z.flip(0)
    labels = torch.tensor([[0], [2]])
    for dtype in (torch.float32, torch.float64):
        q, p = z.to(dtype).softmax(-1), w.to(dtype).softmax(-1)
        norms = z.to(dtype).logsumexp(-1), w.to(dtype).logsumexp(-1)
        pair = Pair(p, q, z.to(dtype), w.to(dtype), *norms, labels, None, kd_lambda=0.5, skew=1.0)
        try:
            user_divergence(name, pair, wants_pull=True)
        except ArgumentError:
            raise
        except Exception as error:  # whatever a user's function raises
            reason = one_line(f"{type(error).__name__}: {error}")
            raise ArgumentError(f"`{name}` fails on two tensors of shape [2, 5]: {reason:.300}.") from error
