"""What the objective's benchmark compares: forward and backward passes through the same random heads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from llamafactory_sekd.objectives import (
    OBJECTIVES,
    FusedOutput,
    default_chunk_size,
    distillation_loss,
    fused_linear_distillation,
    product_type,
)
from llamafactory_sekd.presets import PRESETS


LAMBDA, BETA = 0.5, 0.5
# The products alone run fastest in chunks of about this size here, also where whole ones would fit.
PRODUCT_CHUNK = 512


@dataclass(frozen=True)
class Heads:
    """Hidden states and heads of both models, labels, and a Γ that makes about half of the tokens hard."""

    hidden: torch.Tensor
    head: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_head: torch.Tensor
    labels: torch.Tensor
    gamma: float
    hard_share: float

    def clear(self) -> None:
        self.hidden.grad = self.head.grad = None


def build_heads(
    tokens: int,
    vocab: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    *,
    gamma: float | None = None,
    device: torch.device | None = None,
    alike: bool = False,
) -> Heads:
    """Random heads whose logits spread by about 3.5, as those of trained models do; alike: with much in common."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    student_width, teacher_width = widths
    hidden, teacher_hidden = normal(tokens, student_width), normal(tokens, teacher_width)
    head = normal(vocab, student_width).mul_(3.5 / student_width**0.5)
    teacher_head = normal(vocab, teacher_width).mul_(3.5 / teacher_width**0.5)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    if alike:  # a teacher that often has the same most probable token
        teacher_hidden[:, :student_width] = hidden
        teacher_head[:, :student_width] = head * (student_width / teacher_width) ** 0.5
    heads = Heads(
        hidden.to(device, dtype).requires_grad_(),
        head.to(device, dtype).requires_grad_(),
        teacher_hidden.to(device, dtype),
        teacher_head.to(device, dtype),
        labels.to(device),
        gamma=gamma or 0.0,
        hard_share=0.5,
    )
    return heads if gamma is not None else _with_gamma(heads)


def _with_gamma(heads: Heads) -> Heads:
    """Γ in the widest gap of the middle difficulties, so that rounding moves no token to the other side."""
    sample = min(128, len(heads.labels))
    with torch.no_grad():
        difficulty = distillation_loss(
            heads.hidden[:sample] @ heads.head.t(),
            heads.teacher_hidden[:sample] @ heads.teacher_head.t(),
            heads.labels[:sample],
        ).difficulty
    ranked = difficulty.sort(descending=True).values
    quarter = sample // 4
    middle = ranked[quarter : sample - quarter]
    place = int((middle[:-1] - middle[1:]).argmax())
    gamma = float((middle[place] + middle[place + 1]) / 2)
    return Heads(
        heads.hidden, heads.head, heads.teacher_hidden, heads.teacher_head, heads.labels, gamma,
        hard_share=(quarter + place + 1) / sample,
    )  # fmt: skip


def objective_keys(heads: Heads, kd_loss: Any) -> dict[str, Any]:
    """The keys of an objective, with the share of hard tokens at which Γ was chosen."""
    topk = heads.hard_share if kd_loss == "self_evolution_topk" else None
    # In a formula Γ is at most the running mean of a signal, of which that of AdaKD starts at 0.5.
    gamma = heads.gamma if isinstance(kd_loss, str) and kd_loss in OBJECTIVES else 0.5
    return {"kd_loss": kd_loss, "kd_lambda": LAMBDA, "kd_beta": BETA, "kd_gamma": gamma, "kd_topk": topk}


def fused(heads: Heads, kd_loss: Any, compile: bool = False, chunk_size: int | None = None) -> torch.Tensor:
    return fused_output(heads, kd_loss, compile, chunk_size).loss


def fused_output(heads: Heads, kd_loss: Any, compile: bool = False, chunk_size: int | None = None) -> FusedOutput:
    dtype, device = product_type(heads.head), heads.head.device
    output = fused_linear_distillation(
        heads.hidden,
        heads.head,
        heads.teacher_hidden,
        heads.teacher_head,
        heads.labels,
        num_items=len(heads.labels),
        chunk_size=chunk_size or default_chunk_size(len(heads.head), dtype, device=device),
        compile=compile,
        **objective_keys(heads, kd_loss),  # type: ignore[arg-type]
    )
    output.loss.backward()
    return output


def naive_logits(heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    """In float32, as the Hugging Face trainer casts them for its loss."""
    with torch.no_grad():
        teacher = F.linear(heads.teacher_hidden, heads.teacher_head).float()
    return F.linear(heads.hidden, heads.head).float(), teacher


def naive_self_evolution(heads: Heads) -> None:
    """Equations 4 to 9 written down with autograd."""
    student, teacher = naive_logits(heads)
    log_q = student.log_softmax(-1)
    target = LAMBDA * teacher.softmax(-1)
    target.scatter_add_(-1, heads.labels.unsqueeze(-1), target.new_full((len(target), 1), 1 - LAMBDA))
    easy = F.kl_div(log_q, target, reduction="none").sum(-1)
    proxy = BETA * log_q.exp() + (1 - BETA) * target
    hard = F.kl_div(proxy.log(), target, reduction="none").sum(-1)
    torch.where(easy.detach() > heads.gamma, hard, easy).mean().backward()


def naive_forward_kl(heads: Heads) -> None:
    """Equation 3 written down with autograd."""
    student, teacher = naive_logits(heads)
    divergence = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    (LAMBDA * divergence.mean() + (1 - LAMBDA) * F.cross_entropy(student, heads.labels)).backward()


def trl_gkd(heads: Heads) -> None:
    """The loss of TRL's GKDTrainer as forward KL (beta 0); it has no ground-truth term."""
    from trl import GKDTrainer

    student, teacher = naive_logits(heads)
    GKDTrainer.generalized_jsd_loss(student.unsqueeze(0), teacher.unsqueeze(0), beta=0.0).backward()


def trl_chunked(heads: Heads, beta: float) -> torch.Tensor:
    """TRL's chunked divergence, of version 1.16: forward KL at beta 0; it has no ground-truth term."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        heads.hidden, heads.head, None, heads.teacher_hidden, heads.teacher_head, None, beta
    )
    loss = divergence.mean()
    loss.backward()
    return loss


def liger_jsd(heads: Heads) -> None:
    """Liger's chunked loss as forward KL (beta 0) plus cross-entropy, its defaults otherwise, not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(LAMBDA, 1 - LAMBDA, beta=0.0, compiled=False)
    loss(heads.hidden, heads.head, heads.teacher_hidden, heads.teacher_head, heads.labels).backward()


@torch.no_grad()
def bare_products(heads: Heads) -> None:
    """Both logits and both gradients, with nothing in between: the limit."""
    vocab, dtype, device = len(heads.head), heads.head.dtype, heads.head.device
    chunk = PRODUCT_CHUNK if device.type == "cpu" else default_chunk_size(vocab, dtype, device=device)
    student, teacher = (torch.empty(chunk, vocab, dtype=dtype, device=device) for _ in range(2))
    grad_hidden, grad_head = torch.empty_like(heads.hidden), torch.zeros_like(heads.head)
    for start in range(0, len(heads.labels), chunk):
        rows = slice(start, start + chunk)
        number = len(heads.labels[rows])
        torch.mm(heads.hidden[rows], heads.head.t(), out=student[:number])
        torch.mm(heads.teacher_hidden[rows], heads.teacher_head.t(), out=teacher[:number])
        torch.mm(student[:number], heads.head, out=grad_hidden[rows])
        grad_head.addmm_(student[:number].t(), heads.hidden[rows])


@torch.no_grad()
def bare_products_in_float32(heads: Heads) -> None:
    """The same of the inputs in float32: the limit where a machine has no instructions for their own type."""
    matrices = (heads.hidden, heads.head, heads.teacher_hidden, heads.teacher_head)
    bare_products(
        Heads(*(matrix.detach().float() for matrix in matrices), heads.labels, heads.gamma, heads.hard_share)
    )


def squared_distance(target: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """A divergence of a user's own, whose derivative autograd takes."""
    return (target - student) ** 2


# Objectives without a closed form of their own, and two that have one, by the formula: what it is worth.
GENERIC: dict[str, Any] = {
    **{name: name for name in PRESETS if name not in OBJECTIVES},
    "no_evolution by the formula": {"divergence": "kl"},
    "skew by the formula": {"divergence": "kl", "skew": BETA},
    "a user's function": {"divergence": f"{__name__}:squared_distance"},
    "KL alone": {"target": "teacher", "divergence": "kl", "lambda": 1},
    "JSD alone": {"target": "teacher", "divergence": "jsd", "lambda": 1},
}
FUSED = {
    **{f"ours, {name}": functools.partial(fused, kd_loss=name) for name in OBJECTIVES},
    **{f"ours, {name}, compiled": functools.partial(fused, kd_loss=name, compile=True) for name in OBJECTIVES},
    **{f"ours, {name}": functools.partial(fused, kd_loss=kd_loss) for name, kd_loss in GENERIC.items()},
    **{
        f"ours, {name}, compiled": functools.partial(fused, kd_loss=kd_loss, compile=True)
        for name, kd_loss in GENERIC.items()
        if name != "a user's function"
    },
}
CONTENDERS: dict[str, Callable[[Heads], object]] = {
    **FUSED,
    "naive autograd, self_evolution": naive_self_evolution,
    "naive autograd, forward_kl": naive_forward_kl,
    "Liger, JSD": liger_jsd,
    "TRL, GKD": trl_gkd,
    "TRL, chunked KL": functools.partial(trl_chunked, beta=0.0),
    "TRL, chunked JSD": functools.partial(trl_chunked, beta=0.5),
    "the four products": bare_products,
    "the four products, float32": bare_products_in_float32,
}


def bytes_moved(
    tokens: int, chunk_size: int, vocab_size: int, widths: tuple[int, int], itemsize: int = 2, sum_itemsize: int = 4
) -> int:
    """Return the bytes that the objective reads from and writes to an accelerator's memory.

    Per chunk both heads are read for the logits, the student's again for the gradient of the hidden states, and the
    head's gradient is read and written. Per token both logits are written, read by the objective, overwritten with the
    gradient, and read by the two products of the backward pass.

    Args:
        tokens: response tokens of a micro-batch.
        chunk_size: tokens at a time.
        vocab_size: entries of both heads.
        widths: of the student's and the teacher's hidden states.
        itemsize: bytes of a number of heads and logits.
        sum_itemsize: bytes of a number in the sum of the head's gradient.
    """
    student, teacher = widths
    chunks = math.ceil(tokens / chunk_size)
    heads = vocab_size * itemsize * (2 * student + teacher)
    gradient = 2 * vocab_size * sum_itemsize * student
    logits = vocab_size * itemsize * (2 + 2 + 1 + 2)
    return chunks * (heads + gradient) + tokens * logits


def products_seconds(tokens: int, vocab_size: int, widths: tuple[int, int], flops: float = 728e12) -> float:
    """Return the time of the four products: both logits, and the gradients of hidden states and head.

    Args:
        tokens: response tokens of a micro-batch.
        vocab_size: entries of both heads.
        widths: of the student's and the teacher's hidden states.
        flops: operations per second; the default was measured by others on an H100 in bfloat16.
    """
    student, teacher = widths
    return 2 * tokens * vocab_size * (3 * student + teacher) / flops
