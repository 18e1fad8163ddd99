"""The formula of all objectives as its documentation writes it: plain Python floats, loops, and the YAML's mapping.

Nothing here is shared with the package. Gradients are central differences of the loss, with the gate's decisions held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from helpers.naive_objectives import Row, central_differences, kl, proxy, softmax, target


PARAMETERS = {"mix": 0.5, "alpha": 0.2, "beta": 0.7, "head": 0.5}


def xlog(x: float, y: float) -> float:
    return 0.0 if x == 0.0 else (math.inf if y == 0.0 else x * math.log(x / y))


def alpha_beta(t: Row, s: Row, a: float, b: float) -> float:
    if b == 0.0:
        return sum(a * x**a * math.log(x / y) - x**a + y**a for x, y in zip(t, s, strict=True)) / a**2
    if a == 0.0:
        return alpha_beta(s, t, b, a)
    c = a + b
    return -sum(x**a * y**b - a / c * x**c - b / c * y**c for x, y in zip(t, s, strict=True)) / (a * b)


def head_share(t: Row, s: Row, head: float) -> float:
    order = sorted(range(len(t)), key=lambda index: -t[index])
    inside = [index for rank, index in enumerate(order) if rank == 0 or sum(t[i] for i in order[: rank + 1]) <= head]
    gaps = [abs(x - y) for x, y in zip(t, s, strict=True)]
    return sum(gaps[index] for index in inside) / sum(gaps) if sum(gaps) > 0 else 1.0


def divergence(name: str, t: Row, s: Row, numbers: Mapping[str, float], held: float | None = None) -> float:
    middle = proxy(s, t, numbers["mix"])
    pairs = list(zip(t, s, strict=True))
    if name == "kl":
        return kl(t, s)
    if name == "reverse_kl":
        return kl(s, t)
    if name == "jsd":
        return (1 - numbers["mix"]) * kl(t, middle) + numbers["mix"] * kl(s, middle)
    if name == "skew_reverse_kl":
        return kl(s, middle)
    if name == "tvd":
        return sum(abs(x - y) for x, y in pairs) / 2
    if name == "hellinger":
        return sum((math.sqrt(x) - math.sqrt(y)) ** 2 for x, y in pairs) / 2
    if name == "alpha_beta":
        return alpha_beta(t, s, numbers["alpha"], numbers["beta"])
    if name == "adaptive_kl":
        share = head_share(t, s, numbers["head"]) if held is None else held
        return share * kl(t, s) + (1 - share) * kl(s, t)
    if name == "user_functions:squares":
        return sum((x - y) ** 2 for x, y in pairs)
    raise AssertionError(name)


def side_loss(z: Row, w: Row, label: int, side: Mapping[str, Any], goal: str, held: float | None = None) -> float:
    weight = side.get("weight", 1.0)
    if weight == 0.0:
        return 0.0
    temperature, share = side.get("temperature", 1.0), side["lambda"]
    p, q = softmax(side.get("held target", w), temperature), softmax(z, temperature)
    t = p if goal == "teacher" else target(p, label, share)
    s = proxy(q, t, side.get("skew", 1.0))
    chosen = side["divergence"]
    factors = {chosen: 1.0} if isinstance(chosen, str) else chosen
    numbers = {**PARAMETERS, **side}
    loss = sum(f * divergence(name, t, s, numbers, held) for name, f in factors.items()) * temperature**2
    if goal == "teacher":
        loss = share * loss + (1 - share) * -math.log(softmax(z)[label])
    return weight * loss


def entropy(p: Row) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def signal(z: Row, w: Row, label: int, name: str, easy: Mapping[str, Any]) -> float:
    p, q = softmax(w), softmax(z)
    if name == "difficulty":
        temperature = easy.get("temperature", 1.0)
        return kl(target(softmax(w, temperature), label, easy.get("lambda", 0.5)), softmax(z, temperature))
    return {
        "teacher_probability": p[label],
        "student_probability": q[label],
        "teacher_entropy": entropy(p),
        "student_entropy": entropy(q),
        "hellinger": math.sqrt(max(0.0, 1 - sum(math.sqrt(x * y) for x, y in zip(p, q, strict=True)))),
        "agreement": float(max(range(len(p)), key=p.__getitem__) == max(range(len(q)), key=q.__getitem__)),
    }[name]


def degrees(signals: Sequence[float], gate: Mapping[str, Any] | None) -> list[float]:
    if gate is None:
        return [0.0] * len(signals)
    if "share" in gate:
        number = math.floor(gate["share"] * len(signals) + 0.5)
        ranking = sorted(range(len(signals)), key=lambda index: (-signals[index], index))
        return [float(index in ranking[:number]) for index in range(len(signals))]
    sign = 1 if "above" in gate else -1
    distances = [sign * (value - gate["above" if sign > 0 else "below"]) for value in signals]
    if gate.get("width"):
        return [1 / (1 + math.exp(-distance / gate["width"])) for distance in distances]
    return [float(distance > 0) for distance in distances]


def batch(
    z: Sequence[Row], w: Sequence[Row], labels: Sequence[int], mapping: Mapping[str, Any]
) -> tuple[list[float], list[list[float]], list[float], list[float]]:
    """Loss and gradient, signal and degree of hardness of every token; the mapping is written out in full."""
    easy, gate, goal = mapping["easy"], mapping.get("gate"), mapping["target"]
    tokens = list(zip(z, w, labels, strict=True))
    signals = [signal(*token, (gate or {"signal": "difficulty"})["signal"], easy) for token in tokens]
    hardness = degrees(signals, gate)
    losses, gradients = [], []
    for (row, other, label), value, degree in zip(tokens, signals, hardness, strict=True):
        # What has no gradient by definition is held at the point: the gate with its temperatures, the student in the
        # target, and the share of adaptive_kl.
        sides = {name: _held_side(row, other, value, mapping, name) for name in ("easy", "hard") if name in mapping}
        held = _held(row, other, label, {**mapping, **sides})

        def loss(
            point: Row,
            other: Row = other,
            label: int = label,
            degree: float = degree,
            held: Any = held,
            sides: Any = sides,
        ) -> float:
            total = 0.0
            for name, weight in (("easy", 1 - degree), ("hard", degree)):
                if weight > 0:
                    total += weight * side_loss(point, other, label, sides[name], goal, held.get(name))
            return total

        losses.append(loss(row))
        gradients.append(central_differences(loss, row))
    return losses, gradients, signals, hardness


def _held_side(z: Row, w: Row, value: float, mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The side of one token: with its temperature, and with the logits of its target."""
    side, gate = dict(mapping[name]), mapping.get("gate") or {}
    if "cooling" in gate:
        sign, threshold = (1, gate["above"]) if "above" in gate else (-1, gate["below"])
        ratio = (value / threshold) ** 2  # tanh log x = (x² - 1) / (x² + 1)
        factor = math.exp(-sign * gate["cooling"] * (ratio - 1) / (ratio + 1))
        side["temperature"] = side.get("temperature", 1.0) * factor
    pace = side.get("interpolation", 1.0)
    side["held target"] = [pace * theirs + (1 - pace) * ours for ours, theirs in zip(z, w, strict=True)]
    return side


def _held(z: Row, w: Row, label: int, mapping: Mapping[str, Any]) -> dict[str, float]:
    held: dict[str, float] = {}
    for name in ("easy", "hard"):
        side: Mapping[str, Any] = mapping.get(name) or {}
        if "adaptive_kl" in str(side.get("divergence")):
            temperature = side.get("temperature", 1.0)
            p, q = softmax(side["held target"], temperature), softmax(z, temperature)
            t = p if mapping["target"] == "teacher" else target(p, label, side["lambda"])
            held[name] = head_share(t, proxy(q, t, side.get("skew", 1.0)), {**PARAMETERS, **side}["head"])
    return held
