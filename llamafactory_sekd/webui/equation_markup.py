"""The objectives' equations in LaTeX, as the panel renders them."""

from __future__ import annotations


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
    "alpha_beta": (
        rf"\ell = {_CROSS_ENTROPY} + \lambda\,D_{{0.2,\,0.7}}(p \,\|\, q)",
        r"D_{a,b} = -\tfrac{1}{ab} \textstyle\sum \left[\, p^a q^b - \tfrac{a}{a+b}\,p^{a+b} "
        r"- \tfrac{b}{a+b}\,q^{a+b} \right]",
    ),
    "entropy_gate": (
        rf"\ell = \begin{{cases}} {_CROSS_ENTROPY} + \lambda\,{_FORWARD} & H(q) \in \text{{top 20 \%}} "
        r"\\ 0 & \text{else} \end{cases}",
    ),
    "acceptance_gate": (
        rf"\ell = \begin{{cases}} {_CROSS_ENTROPY} + \lambda\,{_FORWARD} & \arg\max q = \arg\max p "
        r"\\ 0 & \text{else} \end{cases}",
    ),
    "entropy_forward": (
        rf"\ell = {_CROSS_ENTROPY} + \lambda\,{_REVERSE} + \begin{{cases}} \lambda\,{_FORWARD} & H(p) > 0.8 "
        r"\\ 0 & \text{else} \end{cases}",
    ),
    "adaptive_kl": (rf"\ell = {_CROSS_ENTROPY} + \lambda\,[g\,{_FORWARD} + (1-g)\,{_REVERSE}]",),
    "adaptive_temperature": (
        rf"\ell = {_CROSS_ENTROPY} + \lambda\,T^2\,{_REVERSE}",
        r"T = e^{-0.6 \tanh \log (h / \bar h)} \qquad h^2 = 1 - \textstyle\sum \sqrt{p\,q}",
    ),
    "taid": (
        rf"\ell = {_CROSS_ENTROPY} + \lambda\,\mathrm{{KL}}(p' \,\|\, q)",
        r"p' = \mathrm{softmax}(\tau\,w + (1-\tau)\,z) \qquad \tau: 0.4 \to 1",
    ),
    "verified_reference": (
        rf"\ell = {_TO_STUDENT}",
        r"\tilde y = \begin{cases} p & p_y < 0.01 \\ (1-\lambda)\,y + \lambda\,p & \text{else} \end{cases}",
    ),
}


def equation(kd_loss: str) -> str:
    """Return the loss of one response token as display mathematics in Markdown, empty for a mapping of the user."""
    parts = _EQUATIONS.get(kd_loss)
    return "$$" + r" \qquad ".join(parts) + "$$" if parts else ""
