"""The objectives' equations in LaTeX, as the panel renders them."""

from __future__ import annotations

from llamafactory_sekd.presets import PRESETS


_TARGET = r"\tilde y = (1-\lambda)\,y + \lambda\,p"
_PROXY = r"\hat q = \beta\,q + (1-\beta)\,\tilde y"
_TO_PROXY = r"\mathrm{KL}(\tilde y \,\|\, \hat q)"
_TO_STUDENT = r"\mathrm{KL}(\tilde y \,\|\, q)"
_DIFFICULTY = r"d = \mathrm{KL}(\tilde y \,\|\, q)"
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
    "forward_kl": (rf"\ell = {_CROSS_ENTROPY} + \lambda\,\mathrm{{KL}}(p \,\|\, q)",),
    "reverse_kl": (rf"\ell = {_CROSS_ENTROPY} + \lambda\,\mathrm{{KL}}(q \,\|\, p)",),
}


def equation(kd_loss: str) -> str:
    """Return the loss of one response token as display mathematics in Markdown; in words where there is no LaTeX."""
    parts = _EQUATIONS.get(kd_loss)
    if parts is None:
        return f"`{PRESETS[kd_loss].equation}`" if kd_loss in PRESETS else ""
    return "$$" + r" \qquad ".join(parts) + "$$"
