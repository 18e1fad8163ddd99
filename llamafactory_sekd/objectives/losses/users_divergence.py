"""A divergence of the user's own: an elementwise function in a module of theirs, with its derivative by autograd."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llamafactory_sekd.errors import ArgumentError, one_line
from llamafactory_sekd.objectives.compiling import may_look, row_sums
from llamafactory_sekd.objectives.losses.elementwise import Pair, Term


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
    # Inside of the fused Function grad mode is off. The graph holds one block and goes with it.
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
    # Where a look would wait for an accelerator the trial before the run has to do.
    if may_look(value.device):
        _refuse_nan(name, value, sums, pair)
        if slope is not None:
            _refuse_nan(f"the derivative of {name}", slope, row_sums(slope), pair)
    return Term(sums, None if slope is None else slope.detach() * pair.s)


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
    # Ranks and workers that a launcher starts have the directory of its script in the path and not that of the run.
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
        log_q, log_p = z.to(dtype).log_softmax(-1), w.to(dtype).log_softmax(-1)
        logarithms = (log_p.add, log_q.add, (log_p - log_q).add)
        ce = -log_q.gather(-1, labels).squeeze(-1)
        pair = Pair(log_p.exp(), log_q.exp(), *logarithms, labels, ce, None, kd_lambda=0.5, skew=1.0)
        try:
            user_divergence(name, pair, wants_pull=True)
        except ArgumentError:
            raise
        except Exception as error:  # whatever a user's function raises
            reason = one_line(f"{type(error).__name__}: {error}")
            raise ArgumentError(f"`{name}` fails on two tensors of shape [2, 5]: {reason:.300}.") from error
