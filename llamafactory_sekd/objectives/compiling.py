"""What happens between the logits and their gradient, compiled: one or two passes in place of one per operation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


logger = logging.getLogger(__name__)
# Of one function in one process: a run needs two or three, whoever goes through objectives and keys many.
COMPILATIONS = 64


class Compiled:
    """A function of tensors `[rows, …]`, compiled when it is first called, for any number of rows.

    Where that fails (no C++ compiler or no Triton on the machine, an objective that decides by its data), the
    function itself runs from then on, and one line in the log says so.
    """

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self._function = function
        self._run: Callable[..., torch.Tensor] | None = None

    def __call__(self, *args: Any) -> torch.Tensor:
        """Return what the function returns."""
        from torch._dynamo import config, maybe_mark_dynamic  # slow to import, and seldom needed
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        if self._run is self._function:
            return self._function(*args)
        for argument in args:
            if isinstance(argument, torch.Tensor) and argument.dim() > 0:
                maybe_mark_dynamic(argument, 0)
        try:
            self._run = self._run or torch.compile(self._function, fullgraph=True)
            # A number that changes means another compilation: torch 2.14 would else use the code of the one before.
            with config.patch(specialize_float=True, recompile_limit=COMPILATIONS):
                return self._run(*args)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # raised before anything has run
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            logger.warning(f"torch.compile failed ({reason:.200}): the objective runs as it is, see `kd_compile`.")
            self._run = self._function
        return self._function(*args)


@cache
def compiled(function: Callable[..., torch.Tensor]) -> Compiled:
    """Return the compiled form of a function, one for the process."""
    return Compiled(function)


def may_look(device: torch.device) -> bool:
    """Whether code may branch on values: free on the CPU, a synchronization elsewhere, impossible in compiled code."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def row_sums(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix.sum(-1)`; compiled for the CPU it would be one long chain, which 128,256 entries make inexact."""
    if matrix.device.type == "cpu" and torch.compiler.is_compiling():
        return matrix.sum(-1, dtype=torch.float64).to(matrix.dtype)
    return matrix.sum(-1)


def softmax_and_norm(logits: torch.Tensor, largest: torch.Tensor, out: torch.Tensor, exact: bool) -> torch.Tensor:
    """Write the softmax to `out` and return `log Σ exp(logits)`, `[rows]`; on the CPU with full precision if `exact`.

    The softmax kernel knows the sum but does not tell; the largest logit and its probability, which cannot underflow,
    give it back for less than another pass of exponentials.
    """
    if torch.compiler.is_compiling():
        norm = largest + row_sums((logits - largest.unsqueeze(-1)).exp()).log()
        torch.exp(logits - norm.unsqueeze(-1), out=out)
        return norm
    torch.softmax(logits, -1, out=out)
    if exact and out.device.type == "cpu":
        # The CPU's kernel adds a row up in a few long chains, which at 128,256 entries is off by 1e-5; `sum` is not.
        out.div_(out.sum(-1, keepdim=True))
    return largest - out.amax(-1).log()
