"""The objectives once more, as the paper writes them: plain Python floats, probabilities and loops, no tensor library.

Nothing here is shared with the package, and nothing is stable: it is meant for moderate logits in float64, where the
textbook formulas are exact to about 1e-12, and its gradients are central differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


Row = Sequence[float]


def softmax(logits: Row, temperature: float = 1.0) -> list[float]:
    exponentials = [math.exp(value / temperature) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def kl(a: Row, b: Row) -> float:
    total = 0.0
    for mass, other in zip(a, b, strict=True):
        if mass == 0.0:
            continue
        if other == 0.0:
            return math.inf
        total += mass * math.log(mass / other)
    return total


def target(teacher: Row, label: int, kd_lambda: float) -> list[float]:
    return [kd_lambda * mass + (1 - kd_lambda) * (index == label) for index, mass in enumerate(teacher)]


def proxy(student: Row, goal: Row, kd_beta: float) -> list[float]:
    return [kd_beta * mine + (1 - kd_beta) * its for mine, its in zip(student, goal, strict=True)]


def difficulty(z: Row, w: Row, label: int, kd_lambda: float, temperature: float = 1.0) -> float:
    return kl(target(softmax(w, temperature), label, kd_lambda), softmax(z, temperature))


def token_loss(
    z: Row,
    w: Row,
    label: int,
    kd_loss: str,
    hard: bool,
    *,
    kd_lambda: float,
    kd_beta: float,
    kd_temperature: float,
    **_: object,
) -> float:
    p, q = softmax(w, kd_temperature), softmax(z, kd_temperature)
    goal = target(p, label, kd_lambda)
    square = kd_temperature * kd_temperature
    if kd_loss == "no_evolution":
        return square * kl(goal, q)
    if kd_loss == "skew":
        return square * kl(goal, proxy(q, goal, kd_beta))
    if kd_loss in ("self_evolution", "self_evolution_topk"):
        return square * (kl(goal, proxy(q, goal, kd_beta)) if hard else kl(goal, q))
    ce = -math.log(softmax(z)[label])
    if kd_loss == "skew_teacher":
        return (1 - kd_lambda) * ce + kd_lambda * square * kl(p, proxy(q, p, kd_beta))
    if kd_loss == "forward_kl":
        return (1 - kd_lambda) * ce + kd_lambda * square * kl(p, q)
    if kd_loss == "reverse_kl":
        return (1 - kd_lambda) * ce + kd_lambda * square * kl(q, p)
    raise AssertionError(kd_loss)


def hard_tokens(difficulties: Row, kd_loss: str, kd_gamma: float, kd_topk: float | None) -> list[bool]:
    if kd_loss != "self_evolution_topk":
        return [value > kd_gamma for value in difficulties]
    assert kd_topk is not None
    number = math.floor(kd_topk * len(difficulties) + 0.5)
    ranking = sorted(range(len(difficulties)), key=lambda index: (-difficulties[index], index))
    return [index in ranking[:number] for index in range(len(difficulties))]


def batch(
    z: Sequence[Row],
    w: Sequence[Row],
    labels: Sequence[int],
    *,
    kd_loss: str,
    kd_gamma: float,
    kd_topk: float | None,
    **keys: float,
) -> tuple[list[float], list[float], list[bool]]:
    """Loss, difficulty and hardness of every token."""
    temperature = keys["kd_temperature"]
    difficulties = [difficulty(a, b, y, keys["kd_lambda"], temperature) for a, b, y in zip(z, w, labels, strict=True)]
    hard = hard_tokens(difficulties, kd_loss, kd_gamma, kd_topk)
    losses = [token_loss(a, b, y, kd_loss, h, **keys) for a, b, y, h in zip(z, w, labels, hard, strict=True)]
    return losses, difficulties, hard


def central_differences(function: Callable[[list[float]], float], point: Row, step: float = 1e-5) -> list[float]:
    gradient = []
    for index in range(len(point)):
        ends = []
        for sign in (1, -1):
            moved = list(point)
            moved[index] += sign * step
            ends.append(function(moved))
        gradient.append((ends[0] - ends[1]) / (2 * step))
    return gradient
