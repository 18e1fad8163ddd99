"""The objectives' equations in LaTeX, as the panel renders them."""

from __future__ import annotations

from llamafactory_sekd.presets import PRESETS


_TARGET = r"\tilde y = (1-\lambda)\,y + \lambda\,p"
_PROXY = r"\hat q = \beta\,q + (1-\beta)\,\tilde y"
_TO_PROXY = r"\mathrm{KL}(\tilde y \,\|\, \hat q)"
_TO_STUDENT = r"\mathrm{KL}(\tilde y \,\|\, q)"
_DIFFICULTY = r"d = \mathrm{KL}(\tilde y \,\|\, q)"
_FORWARD = r"\mathrm{KL}(p \,\|\, q)"
_REVERSE = r"\mathrm{KL}(q \,\|\, p)"
_CROSS_ENTROPY = r"(1-\lambda)\,(-\log q_y)"

_EQUATIONS = {
    "self_evolution": (
        rf"\ell = \begin{{cases}} {_TO_PROXY} & d > \Gamma \\ {_TO_STUDENT} & \text{{else}} \end{{cases}}",
        _TARGET,
        _PROXY,
        _DIFFICULTY,
    ),
    "self_evolution_topk": (
        rf"\ell = \begin{{cases}} {_TO_PROXY} & d \in \text{{top-}}K \\ {_TO_STUDENT} & \text{{else}} \end{{cases}}",
        _TARGET,
        _PROXY,
        _DIFFICULTY,
    ),
    "no_evolution": (rf"\ell = {_TO_STUDENT}", _TARGET),
    "skew": (rf"\ell = {_TO_PROXY}", _TARGET, _PROXY),
    "skew_teacher": (
        rf"\ell = {_CROSS_ENTROPY} + \lambda\,\mathrm{{KL}}(p \,\|\, \hat q)",
        r"\hat q = \beta\,q + (1-\beta)\,p",
    ),
    "forward_kl": (rf"\ell = {_CROSS_ENTROPY} + \lambda\,{_FORWARD}",),
    "reverse_kl": (rf"\ell = {_CROSS_ENTROPY} + \lambda\,{_REVERSE}",),
    "jsd": (
        rf"\ell = {_CROSS_ENTROPY} + \lambda\,[(1-\beta)\,\mathrm{{KL}}(p \,\|\, m) "
        r"+ \beta\,\mathrm{KL}(q \,\|\, m)]",
        r"m = \beta\,q + (1-\beta)\,p",
    ),
    "skew_reverse_kl": (
        rf"\ell = {_CROSS_ENTROPY} + \lambda\,\mathrm{{KL}}(q \,\|\, m)",
        r"m = \beta\,q + (1-\beta)\,p",
    ),
    "tvd": (rf"\ell = {_CROSS_ENTROPY} + \lambda\,\tfrac12 \textstyle\sum |p - q|",),
    "adaptive_kl": (rf"\ell = {_CROSS_ENTROPY} + \lambda\,[g\,{_FORWARD} + (1-g)\,{_REVERSE}]",),
    "verified_reference": (
        rf"\ell = {_TO_STUDENT}",
        r"\tilde y = \begin{cases} p & p_y < 0.01 \\ (1-\lambda)\,y + \lambda\,p & \text{else} \end{cases}",
    ),
}


def equation(kd_loss: str) -> str:
    """Return the loss of one response token as display mathematics in Markdown; in words where there is no LaTeX."""
    parts = _EQUATIONS.get(kd_loss)
    if parts is None:
        return f"`{PRESETS[kd_loss].equation}`" if kd_loss in PRESETS else ""
    return "$$" + r" \qquad ".join(parts) + "$$"
