"""The objectives by the name that `kd_loss` gives them: each a point of the formula, with its keys and its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamafactory_sekd import formula
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.formula import FIRST_MEANS, Formula


@dataclass(frozen=True, slots=True)
class Preset:
    """A named objective.

    Attributes:
        equation: the loss of a token, in words or symbols: `y~` is the target, `q^` the proxy, `d` the difficulty.
        keys: the keys that it reads, besides those that all objectives read.
        source: where it was published.
        expansion: the mapping that it means. A text that is the name of a key means the key's value.
    """

    equation: str
    keys: frozenset[str]
    source: str
    expansion: Mapping[str, Any]


# What an objective reads where its keys are not given: the paper's settings.
DEFAULT_LOSS = "self_evolution"
DEFAULTS: dict[str, Any] = {
    "kd_lambda": 0.5,
    "kd_beta": 0.5,
    "kd_gamma": FIRST_MEANS["difficulty"],
    "kd_topk": None,
    "kd_temperature": 1.0,
}

_PAPER = "Song et al., COLING 2025 (arXiv 2412.15303)"
_LAMBDA = frozenset({"kd_lambda"})
_BETA = frozenset({"kd_lambda", "kd_beta"})
_SKEWED = {"divergence": "kl", "skew": "kd_beta"}

PRESETS: dict[str, Preset] = {
    "self_evolution": Preset(
        "KL(y~ ‖ q^) where d > Γ, else KL(y~ ‖ q), equations 7 and 8",
        frozenset({"kd_lambda", "kd_beta", "kd_gamma", "kd_hard_scale"}),
        _PAPER,
        {"gate": {"signal": "difficulty", "above": "kd_gamma"}, "easy": {"divergence": "kl"}, "hard": _SKEWED},
    ),
    "self_evolution_topk": Preset(
        "KL(y~ ‖ q^) for the kd_topk share with the largest d, else KL(y~ ‖ q)",
        frozenset({"kd_lambda", "kd_beta", "kd_topk", "kd_hard_scale"}),
        f"{_PAPER}, Figure 2b",
        {"gate": {"signal": "difficulty", "share": "kd_topk"}, "easy": {"divergence": "kl"}, "hard": _SKEWED},
    ),
    "no_evolution": Preset("KL(y~ ‖ q), equation 8", _LAMBDA, _PAPER, {"divergence": "kl"}),
    "skew": Preset("KL(y~ ‖ q^), equation 7", _BETA, _PAPER, _SKEWED),
    "skew_teacher": Preset(
        "(1-λ)(-log q_y) + λ KL(p ‖ βq + (1-β)p), equation 10",
        _BETA,
        f"{_PAPER}, Figure 5",
        {"target": "teacher", **_SKEWED},
    ),
    "forward_kl": Preset(
        "(1-λ)(-log q_y) + λ KL(p ‖ q), equation 3",
        _LAMBDA,
        f"{_PAPER}; Hinton et al. 2015 (arXiv 1503.02531)",
        {"target": "teacher", "divergence": "kl"},
    ),
    "reverse_kl": Preset(
        "(1-λ)(-log q_y) + λ KL(q ‖ p)",
        _LAMBDA,
        f"{_PAPER}; MiniLLM (arXiv 2306.08543)",
        {"target": "teacher", "divergence": "reverse_kl"},
    ),
    "jsd": Preset(
        "(1-λ)(-log q_y) + λ [(1-β) KL(p ‖ m) + β KL(q ‖ m)], m = βq + (1-β)p",
        _BETA,
        "GKD (arXiv 2306.13649), equation 1, whose β is 1-β",
        {"target": "teacher", "divergence": "jsd", "mix": "kd_beta"},
    ),
    "skew_reverse_kl": Preset(
        "(1-λ)(-log q_y) + λ KL(q ‖ βq + (1-β)p)",
        _BETA,
        "DistiLLM (arXiv 2402.03898), whose α (0.1) is β",
        {"target": "teacher", "divergence": "skew_reverse_kl", "mix": "kd_beta"},
    ),
    "tvd": Preset(
        "(1-λ)(-log q_y) + λ ½ Σ|p - q|",
        _LAMBDA,
        "f-Distill (arXiv 2307.15190)",
        {"target": "teacher", "divergence": "tvd"},
    ),
    "alpha_beta": Preset(
        "(1-λ)(-log q_y) + λ D_AB(p ‖ q) with α 0.2 and β 0.7",
        _LAMBDA,
        "ABKD (arXiv 2505.04560)",
        {"target": "teacher", "divergence": "alpha_beta", "alpha": 0.2, "beta": 0.7},
    ),
    "adaptive_kl": Preset(
        "(1-λ)(-log q_y) + λ [g KL(p ‖ q) + (1-g) KL(q ‖ p)], g: the head's share of Σ|p - q|",
        _LAMBDA,
        "AKL (arXiv 2404.02657), head 0.5",
        {"target": "teacher", "divergence": "adaptive_kl", "head": 0.5},
    ),
    "entropy_gate": Preset(
        "forward_kl for the 20 % with the largest entropy of the student, nothing for the others",
        _LAMBDA,
        "SE-KD (arXiv 2602.01395)",
        {
            "target": "teacher",
            "gate": {"signal": "student_entropy", "share": 0.2},
            "easy": {"weight": 0},
            "hard": {"divergence": "kl"},
        },
    ),
    "acceptance_gate": Preset(
        "forward_kl where the student's most probable token is the teacher's, nothing for the others",
        _LAMBDA,
        "SelecTKD (arXiv 2510.24021), greedy, k = 1",
        {
            "target": "teacher",
            "gate": {"signal": "agreement", "above": 0.5},
            "easy": {"weight": 0},
            "hard": {"divergence": "kl"},
        },
    ),
    "entropy_forward": Preset(
        "(1-λ)(-log q_y) + λ KL(q ‖ p), where the teacher's entropy is above 0.8 + λ KL(p ‖ q)",
        _LAMBDA,
        "EOPD (arXiv 2603.07079)",
        {
            "target": "teacher",
            "gate": {"signal": "teacher_entropy", "above": 0.8},
            "easy": {"divergence": "reverse_kl"},
            "hard": {"divergence": {"reverse_kl": 1.0, "kl": 1.0}},
        },
    ),
    "adaptive_temperature": Preset(
        "(1-λ)(-log q_y) + λ T² KL(q ‖ p) at T = exp(-0.6 tanh log(h/mean)), h: the Hellinger distance of p and q",
        _LAMBDA,
        "AdaKD (arXiv 2510.11615), its temperatures",
        {
            "target": "teacher",
            "gate": {"signal": "hellinger", "above": formula.MEAN, "cooling": 0.6},
            "easy": {"divergence": "reverse_kl"},
        },
    ),
    "taid": Preset(
        "(1-λ)(-log q_y) + λ KL(p' ‖ q), p': softmax of τ · teacher's + (1-τ) · student's logits, τ from 0.4 to 1",
        _LAMBDA,
        "TAID (arXiv 2501.16937), its linear schedule",
        {"target": "teacher", "divergence": "kl", "interpolation": {"from": 0.4, "to": 1.0}},
    ),
    "verified_reference": Preset(
        "KL(y~ ‖ q), with λ = 1 where p_y < 0.01",
        _LAMBDA,
        "ours",
        {
            "gate": {"signal": "teacher_probability", "below": 0.01},
            "easy": {"divergence": "kl"},
            "hard": {"divergence": "kl", "lambda": 1.0},
        },
    ),
}
PRESET_KEY = "preset"


def preset_of(kd_loss: Any) -> str | None:
    """Return the name of the preset that a `kd_loss` is or starts from, None for a mapping of its own.

    Raises:
        ArgumentError: there is no such preset.
    """
    name = kd_loss.get(PRESET_KEY) if isinstance(kd_loss, Mapping) else kd_loss
    if isinstance(kd_loss, Mapping) and PRESET_KEY not in kd_loss:
        return None
    if not isinstance(name, str) or name not in PRESETS:
        raise formula.unknown(f"kd_loss.{PRESET_KEY}" if isinstance(kd_loss, Mapping) else "kd_loss", name, PRESETS)
    return name


def expand(kd_loss: Any, keys: Mapping[str, Any]) -> Formula:
    """Return the formula that a `kd_loss` means: a preset's name, a mapping, or one that changes a preset.

    Args:
        kd_loss: the value in the YAML.
        keys: values of `kd_lambda`, `kd_temperature`, and of what the preset reads.

    Raises:
        ArgumentError: the preset or a key is unknown, or a value cannot work.
    """
    name = preset_of(kd_loss)
    mapping: Any = kd_loss
    if name is not None:
        mapping = _filled_in(PRESETS[name].expansion, keys)
        if isinstance(kd_loss, Mapping):
            changes = {key: value for key, value in kd_loss.items() if key != PRESET_KEY}
            mapping = _merged(formula.spelled_out(mapping), formula.spelled_out(changes))
    return formula.parse(mapping, kd_lambda=keys.get("kd_lambda", 0.5), kd_temperature=keys.get("kd_temperature", 1.0))


def _filled_in(value: Any, keys: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {name: _filled_in(entry, keys) for name, entry in value.items()}
    if isinstance(value, str) and value.startswith("kd_"):
        if keys.get(value) is None:
            raise ArgumentError(f"`{value}` is missing: the objective needs it.")
        return keys[value]
    return value


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged, kinds = dict(below), {"above", "below", "share"}
    for key, value in above.items():
        if key == "gate" and isinstance(value, Mapping) and kinds & value.keys():
            # One kind of threshold takes the place of another.
            kept = {name: entry for name, entry in dict(below.get(key) or {}).items() if name not in kinds}
            merged[key] = {**kept, **value}
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key != "divergence":
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged
