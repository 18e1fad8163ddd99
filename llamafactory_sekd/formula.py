"""The one formula of all objectives, as a mapping in the YAML: what it may hold, and what it means.

    L = 1/N Σ_t w_t · T_t² · D_t( y~_t ‖ α_t q_t + (1-α_t) y~_t ),   y~_t = (1-λ_t) y + λ_t p_t

λ, α, w, T and D have one value for the tokens that a gate calls hard and one for the others. The mathematics is in
`objectives`; this module needs no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from llamafactory_sekd.errors import ArgumentError, suggestion


TARGETS: dict[str, str] = {
    "mixed": "D(y~ ‖ αq + (1-α)y~) with y~ = (1-λ)y + λp",
    "teacher": "(1-λ)(-log q_y) + λ D(p ‖ αq + (1-α)p)",
}
SIGNALS: dict[str, str] = {
    "difficulty": "d = KL(y~ ‖ q), with λ and T of the easy tokens",
    "teacher_probability": "p_y, what the teacher gives the reference",
    "student_probability": "q_y, what the student gives the reference",
    "teacher_entropy": "the entropy of p in nats",
    "student_entropy": "the entropy of q in nats",
    "hellinger": "√(1 - Σ√(pq)), from 0 to 1",
    "agreement": "1 where both models have the same most probable token, else 0",
}
MEAN = "mean"
# What the running mean of a signal counts as before the first step.
FIRST_MEANS: dict[str, float] = {
    "difficulty": 0.4,  # the paper's Γ
    "teacher_probability": 0.5,
    "student_probability": 0.5,
    "teacher_entropy": 1.0,
    "student_entropy": 1.0,
    "hellinger": 0.5,
    "agreement": 0.5,
}
# Divergence -> (formula, its parameters). `t` is the target and `s` what it is compared with.
DIVERGENCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "kl": ("Σ t log(t/s)", ()),
    "reverse_kl": ("Σ s log(s/t)", ()),
    "jsd": ("(1-m) Σ t log(t/M) + m Σ s log(s/M), M = ms + (1-m)t, m: `mix`", ("mix",)),
    "skew_reverse_kl": ("Σ s log(s/M), M = ms + (1-m)t, m: `mix`", ("mix",)),
    "tvd": ("½ Σ |t - s|", ()),
    "hellinger": ("½ Σ (√t - √s)²", ()),
    "alpha_beta": (
        "-1/(ab) Σ [t^a s^b - a/(a+b) t^(a+b) - b/(a+b) s^(a+b)], a: `alpha`, b: `beta`",
        ("alpha", "beta"),
    ),
    "adaptive_kl": (
        "g KL(t ‖ s) + (1-g) KL(s ‖ t), g: the share of Σ|t - s| in the head, the entries that hold `head` of t",
        ("head",),
    ),
}
PARAMETERS: dict[str, float] = {"mix": 0.5, "alpha": 0.2, "beta": 0.7, "head": 0.5}
MOST_COOLING = 3.0  # a factor of 20 either way
TEMPERATURES = (0.01, 1000.0)  # beyond them the distributions are one-hot or uniform, and nothing can be learned
_FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")
_SIDE_KEYS = ("divergence", "skew", "weight", "lambda", "temperature", "interpolation", *PARAMETERS)
_GATE_KEYS = ("signal", "above", "below", "share", "width", "cooling")
_FORMULA_KEYS = ("target", "gate", "easy", "hard")


@dataclass(frozen=True, slots=True)
class Moving:
    """A number that moves linearly over the training steps."""

    start: float
    end: float


Number = Any  # a float, or a `Moving` until `Formula.at` has put a float in its place


@dataclass(frozen=True, slots=True)
class Gate:
    """Which tokens are hard.

    Attributes:
        signal: one of `SIGNALS`.
        sign: 1 where large values are hard, -1 where small ones are.
        threshold: what the signal is held against; `MEAN` for its running mean, None with a share.
        share: of the tokens of a micro-batch that are hard, those with the largest signal; None with a threshold.
        width: 0 for a cut; else a token is hard to the degree sigmoid((signal - threshold) / width).
        cooling: c; the temperature of a token is exp(-c tanh log(signal / threshold)) times that of its side, so that
            hard tokens are cooler; with a sign of -1, exp(c …). 0 for the side's own.
    """

    signal: str
    sign: int
    threshold: Number | str | None
    share: Number | None
    width: Number
    cooling: Number


@dataclass(frozen=True, slots=True)
class Side:
    """What tokens of one side of the gate lose.

    Attributes:
        divergences: names or `module:function`, each with its factor; their sum is D.
        parameters: of the divergences, by name.
        kd_lambda: λ, the teacher's share of the target.
        skew: α, the student's share of the proxy.
        weight: w.
        temperature: T.
        interpolation: τ; the teacher's logits in the target are τ w + (1-τ) z.
    """

    divergences: tuple[tuple[str, Number], ...]
    parameters: tuple[tuple[str, Number], ...]
    kd_lambda: Number
    skew: Number
    weight: Number
    temperature: Number
    interpolation: Number

    def parameter(self, name: str) -> Any:
        """Return a parameter of a divergence."""
        return dict(self.parameters)[name]


@dataclass(frozen=True, slots=True)
class Formula:
    """An objective.

    Attributes:
        target: one of `TARGETS`.
        gate: None where all tokens are alike, which `easy` then describes.
        easy: the other tokens.
        hard: the tokens that the gate selects; None without a gate.
    """

    target: str
    gate: Gate | None
    easy: Side
    hard: Side | None

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides that there are."""
        return (self.easy,) if self.hard is None else (self.easy, self.hard)

    def is_measured(self, side: Side) -> bool:
        """Whether a side has the distributions of the easy side's temperature, of which the statistics are."""
        cooling = 0.0 if self.gate is None else self.gate.cooling
        return bool(cooling == 0.0 and side.interpolation == 1.0 and side.temperature == self.easy.temperature)

    def at(self, move: Callable[[float, float], float]) -> Formula:
        """Return the formula of one step; `move` goes from where a number starts and ends to where it is."""
        return _map_numbers(self, lambda number: move(number.start, number.end))

    @property
    def moves(self) -> bool:
        """Whether a number moves over the training."""
        return self != self.at(lambda start, _: start)

    def without_reference(self) -> Formula:
        """Return the formula with λ = 1: for text that is no ground truth."""
        easy, hard = self.easy, self.hard
        return replace(
            self, easy=replace(easy, kd_lambda=1.0), hard=None if hard is None else replace(hard, kd_lambda=1.0)
        )

    def mapping(self) -> dict[str, Any]:
        """Return it as it would be written in a YAML, with nothing left out but what cannot matter."""
        written: dict[str, Any] = {"target": self.target}
        if self.gate is not None:
            gate = {"signal": self.gate.signal}
            if self.gate.threshold is not None:
                gate["above" if self.gate.sign > 0 else "below"] = _written(self.gate.threshold)
            else:
                gate["share"] = _written(self.gate.share)
            further = (("width", self.gate.width), ("cooling", self.gate.cooling))
            written["gate"] = gate | {key: _written(number) for key, number in further if number != 0.0}
        for name, side in (("easy", self.easy), ("hard", self.hard)):
            if side is not None:
                written[name] = _written_side(side)
        return written

    def __str__(self) -> str:
        """Return the mapping on one line, as YAML reads it."""
        return _flow(self.mapping())


def parse(value: Any, *, kd_lambda: float = 0.5, kd_temperature: float = 1.0) -> Formula:
    """Read a mapping.

    Args:
        value: what the YAML holds.
        kd_lambda: λ where the mapping names none.
        kd_temperature: T where the mapping names none.

    Raises:
        ArgumentError: a key is unknown or missing, or a value cannot work.
    """
    mapping = spelled_out(_mapping(value, "kd_loss", (*_FORMULA_KEYS, *_SIDE_KEYS)))
    defaults = {"lambda": kd_lambda, "temperature": kd_temperature}
    target = mapping.get("target", "mixed")
    if target not in TARGETS:
        raise unknown("kd_loss.target", target, TARGETS)
    gate = None if mapping.get("gate") is None else _gate(mapping["gate"])
    if gate is not None and gate.cooling != 0.0 and mapping.get("hard") is None:
        mapping = {**mapping, "hard": mapping.get("easy")}  # then only the temperatures differ
    if (gate is None) != (mapping.get("hard") is None):
        present, missing = ("gate", "hard") if gate is not None else ("hard", "gate")
        raise ArgumentError(f"`kd_loss.{present}` needs `kd_loss.{missing}`: add it, or remove `{present}`.")
    if mapping.get("easy") is None:
        raise ArgumentError("`kd_loss.easy` is missing: it describes all tokens that no gate selects.")
    easy = _side(mapping["easy"], "kd_loss.easy", defaults)
    hard = None if gate is None else _side(mapping["hard"], "kd_loss.hard", defaults)
    formula = Formula(target, gate, easy, hard)
    if all(side.weight == 0.0 for side in formula.sides):
        _refuse("kd_loss.easy.weight", 0, "no token would have a loss; give one side a weight above 0")
    return formula


def spelled_out(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a mapping in which what all tokens share, `divergence` and the like at its top, is under `easy`."""
    short = {key: entry for key, entry in mapping.items() if key in _SIDE_KEYS}
    if not short:
        return mapping
    if any(key in mapping for key in ("gate", "easy", "hard")):
        remedy = "with `gate`, `easy` or `hard` it belongs to one of the two sides"
        _refuse(f"kd_loss.{next(iter(short))}", next(iter(short.values())), remedy)
    return {**{key: entry for key, entry in mapping.items() if key not in short}, "easy": short}


def _gate(value: Any) -> Gate:
    gate = _mapping(value, "kd_loss.gate", _GATE_KEYS)
    signal = gate.get("signal", "difficulty")
    if signal not in SIGNALS:
        raise unknown("kd_loss.gate.signal", signal, SIGNALS)
    kinds = [key for key in ("above", "below", "share") if gate.get(key) is not None]
    if len(kinds) != 1:
        _refuse("kd_loss.gate", _flow(gate), "give it one of `above`, `below` and `share`")
    kind = kinds[0]
    where = f"kd_loss.gate.{kind}"
    width = _number(gate.get("width", 0.0), "kd_loss.gate.width", 0.0, math.inf)
    cooling = _number(gate.get("cooling", 0.0), "kd_loss.gate.cooling", 0.0, MOST_COOLING)
    if kind == "share":
        if width != 0.0:
            _refuse("kd_loss.gate.width", _written(width), "a share has no threshold to be near; remove it")
        if cooling != 0.0:
            _refuse("kd_loss.gate.cooling", _written(cooling), "a share has no threshold to compare with; remove it")
        share = _number(gate[kind], where, 0.0, 1.0)
        if share == 0.0:
            _refuse(where, 0, "use a share above 0 and up to 1")
        return Gate(signal, 1, None, share, 0.0, 0.0)
    threshold = MEAN if gate[kind] == MEAN else _number(gate[kind], where, -math.inf, math.inf, or_else=MEAN)
    if cooling != 0.0 and threshold != MEAN and min(_ends(threshold)) <= 0.0:
        _refuse(where, _written(threshold), "`cooling` divides the signal by it; use a number above 0")
    return Gate(signal, 1 if kind == "above" else -1, threshold, None, width, cooling)


def _side(value: Any, where: str, defaults: Mapping[str, float]) -> Side:
    side = _mapping(value, where, _SIDE_KEYS)
    divergences = _divergences(side.get("divergence", "kl"), f"{where}.divergence")
    known = [name for divergence, _ in divergences for name in DIVERGENCES.get(divergence, ("", ()))[1]]
    parameters = []
    for name in PARAMETERS:
        if name in known:
            largest = math.inf if name in ("alpha", "beta") else 1.0
            number = _number(side.get(name, PARAMETERS[name]), f"{where}.{name}", 0.0, largest)
            if largest == 1.0 and any(end in (0.0, 1.0) for end in _ends(number)):
                _refuse(f"{where}.{name}", _written(number), "use a number between 0 and 1, without the two")
            parameters.append((name, number))
        elif name in side:
            names = [divergence for divergence, (_, own) in DIVERGENCES.items() if name in own]
            _refuse(f"{where}.{name}", side[name], f"it belongs to `divergence: {' or '.join(names)}`; remove it")
    read = dict(parameters)
    if "alpha" in read and 0.0 in _ends(read["alpha"]) and 0.0 in _ends(read["beta"]):
        _refuse(f"{where}.alpha", 0, "`alpha` and `beta` cannot both be 0")
    skew = _number(side.get("skew", 1.0), f"{where}.skew", 0.0, 1.0)
    if skew == 0.0:
        _refuse(f"{where}.skew", 0, "it is the student's share of the proxy, and without it no loss has a gradient")
    return Side(
        divergences=divergences,
        parameters=tuple(parameters),
        kd_lambda=_number(side.get("lambda", defaults["lambda"]), f"{where}.lambda", 0.0, 1.0),
        skew=skew,
        weight=_number(side.get("weight", 1.0), f"{where}.weight", 0.0, math.inf),
        temperature=_number(side.get("temperature", defaults["temperature"]), f"{where}.temperature", *TEMPERATURES),
        interpolation=_number(side.get("interpolation", 1.0), f"{where}.interpolation", 0.0, 1.0),
    )


def _divergences(value: Any, where: str) -> tuple[tuple[str, Number], ...]:
    """Read a name, or a mapping of names to factors."""
    named = {value: 1.0} if isinstance(value, str) else value
    if not isinstance(named, Mapping) or not named:
        _refuse(where, value, "use a name, `module:function`, or a mapping of such names to factors")
    for name in named:
        if name not in DIVERGENCES and not _FUNCTION.fullmatch(str(name)):
            raise unknown(where, name, [*DIVERGENCES, "module:function"])
    return tuple((str(name), _number(factor, f"{where}.{name}", 0.0, math.inf)) for name, factor in named.items())


def _number(value: Any, where: str, low: float, high: float, or_else: str = "") -> Number:
    if isinstance(value, Mapping):
        if set(value) != {"from", "to"}:
            _refuse(where, _flow(value), "a number that moves is `{from: a, to: b}`")
        return Moving(*(_number(value[end], f"{where}.{end}", low, high) for end in ("from", "to")))
    number = _plain_number(value)
    if number is None or math.isnan(number) or not low <= number <= high:
        if math.isinf(low):
            span = "a number"
        else:
            span = f"a number from {low:g}" + (f" to {high:g}" if math.isfinite(high) else "")
        _refuse(where, value, f"use {span}{f', or {or_else}' if or_else else ''}, or `{{from: a, to: b}}`")
    assert number is not None
    return number


def _plain_number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):  # YAML reads `1e-3` as text
        try:
            return float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, (int, float)) else None


def _mapping(value: Any, where: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        _refuse(where, value, f"use a mapping with {', '.join(known)}")
    for key in value:
        if key not in known:
            raise unknown(where, key, known)
    return value


def _ends(number: Number) -> tuple[float, ...]:
    return (number.start, number.end) if isinstance(number, Moving) else (number,)


def _map_numbers(item: Any, function: Callable[[Moving], float]) -> Any:
    if isinstance(item, Moving):
        return function(item)
    if isinstance(item, tuple):
        return tuple(_map_numbers(entry, function) for entry in item)
    if isinstance(item, (Formula, Gate, Side)):
        return type(item)(*(_map_numbers(getattr(item, entry.name), function) for entry in fields(item)))
    return item


def _written_side(side: Side) -> dict[str, Any]:
    if side.weight == 0.0:
        return {"weight": 0}
    single = len(side.divergences) == 1 and side.divergences[0][1] == 1.0
    names = {name: _written(factor) for name, factor in side.divergences}
    written = {"divergence": next(iter(names)) if single else names}
    written |= {name: _written(number) for name, number in side.parameters}
    for key, number, default in (("skew", side.skew, 1.0), ("weight", side.weight, 1.0)):
        if number != default:
            written[key] = _written(number)
    written["lambda"] = _written(side.kd_lambda)
    for key, number in (("temperature", side.temperature), ("interpolation", side.interpolation)):
        if number != 1.0:
            written[key] = _written(number)
    return written


def _written(number: Any) -> Any:
    if isinstance(number, Moving):
        return {"from": _written(number.start), "to": _written(number.end)}
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(entry)}" for key, entry in value.items()) + "}"
    return str(value)


def unknown(where: str, word: Any, known: Iterable[str]) -> ArgumentError:
    """Return the error for a word that is none of the known ones, with the one that is meant or with all of them."""
    return ArgumentError(f"`{where}: {' '.join(str(word).split()):.200}` is unknown{suggestion(str(word), known)}")


def _refuse(where: str, value: Any, remedy: str) -> None:
    text = " ".join((_flow(value) if isinstance(value, Mapping) else str(value)).split())
    raise ArgumentError(f"`{where}: {text:.200}` cannot be used: {remedy}.")
