"""The panel of the training tab: a field for every key of the stage, the equation, the student's own samples."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from llamafactory_sekd.arguments import AUTO, HARD_SCALES, KEYS, DistillationArguments
from llamafactory_sekd.webui.page import (
    COMPILE,
    NO_QUANTIZATION,
    element_labels,
    objective_choices,
    unused_keys,
    words,
)


# Gradio's own colors of help texts and buttons have too little contrast to read.
_STYLE = """
:is(#sekd_tab, #quality_tab, #compare_tab) {
  --button-primary-background-fill: var(--primary-700);
  --button-primary-background-fill-hover: var(--primary-800);
  --button-cancel-background-fill: #b91c1c;
  --button-cancel-background-fill-hover: #991b1b;
}
body:not(.dark) :is(#sekd_tab, #quality_tab, #compare_tab) {
  --block-info-text-color: var(--neutral-600);
  --body-text-color-subdued: var(--neutral-600);
}
"""
_DELIMITERS: list[dict[str, str | bool]] = [{"left": "$$", "right": "$$", "display": True}]
_COLUMNS = ("step", "source", "sample", "reference", "teacher_logprob")
_STEPS = 5  # the newest ones

# The equations in LaTeX, as the page renders them.
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


@dataclass(frozen=True)
class Panel:
    """The accordion and its fields, by the key of the training YAML that each sets."""

    accordion: gr.Accordion
    advanced: gr.Accordion
    fields: dict[str, Any]

    def elements(self) -> dict[str, Any]:
        """All of it by name, for the host's manager."""
        return {"sekd_tab": self.accordion, "sekd_advanced": self.advanced, **self.fields}

    def connect(
        self,
        training_stage: gr.Dropdown,
        stage_label: str,
        list_teachers: Callable[[], Sequence[str]],
        list_adapters: Callable[[str | None], Sequence[str]],
        student: gr.Textbox,
        server_problem: Callable[[str, str | None], str],
    ) -> None:
        """Show the panel where the stage is ours, with the suggestions of that moment, and check a server once named.

        Args:
            training_stage: the host's dropdown.
            stage_label: what it calls our stage.
            list_teachers: checkpoints and models to offer as a teacher.
            list_adapters: from the chosen teacher to the adapters that were trained for it.
            student: the host's field with the path of the model.
            server_problem: from a server's address and the student to what is wrong with it, "" for nothing.
        """
        teacher, adapters = self.fields["teacher_model"], self.fields["teacher_model_adapters"]

        def show(label: str) -> tuple[gr.Accordion, gr.Dropdown]:
            ours = label == stage_label
            return gr.Accordion(visible=ours), gr.Dropdown(choices=list(list_teachers()) if ours else [])

        def warn(url: str, model: str | None) -> None:
            if url and (problem := server_problem(url.strip(), model)):
                gr.Warning(problem)

        # Not when the field is opened: Gradio filters new suggestions by the text in it.
        training_stage.change(show, [training_stage], [self.accordion, teacher], queue=False)
        adapters.focus(lambda name: gr.Dropdown(choices=list(list_adapters(name))), [teacher], [adapters], queue=False)
        # In the queue, through which warnings come; it waits for the server while the page goes on.
        server = self.fields["teacher_server"]
        server.blur(warn, [server, student], None, show_progress="hidden", concurrency_limit=None)


def build_panel() -> Panel:
    """Build the panel at the page's current place, hidden."""
    built: dict[str, Any] = {}
    with gr.Accordion(open=True, visible=False, elem_id="sekd_tab") as accordion:
        with gr.Row():
            built["teacher_model"] = gr.Dropdown(allow_custom_value=True, scale=3, **_texts("teacher_model"))
            built["teacher_model_adapters"] = gr.Dropdown(
                multiselect=True, allow_custom_value=True, scale=2, **_texts("teacher_model_adapters")
            )

        built["kd_loss"] = gr.Dropdown(value=_default("kd_loss"), allow_custom_value=True, **_texts("kd_loss"))
        shown = gr.Markdown(equation(_default("kd_loss")), latex_delimiters=_DELIMITERS, elem_id="sekd_equation")
        with gr.Row():
            built["kd_lambda"] = _share("kd_lambda")
            built["kd_beta"] = _share("kd_beta")
            built["kd_gamma"] = _text("kd_gamma")
            built["kd_topk"] = _text("kd_topk", value="0.5")

        with gr.Accordion(open=False, elem_id="sekd_advanced", **element_labels()["sekd_advanced"]["en"]) as advanced:
            _build_advanced(built)

    _add_style()
    panel = Panel(accordion, advanced, built)
    _show_by_objective(panel, shown)
    return panel


def _add_style() -> None:
    from gradio.context import Context

    assert Context.root_block is not None  # components exist in a page only
    Context.root_block.css = (Context.root_block.css or "") + _STYLE


def _build_advanced(built: dict[str, Any]) -> None:
    """Add a field for every other key."""
    with gr.Row():
        built["teacher_cache"] = _text("teacher_cache", scale=2)
        built["teacher_model_quantization_bit"] = gr.Dropdown(
            choices=[NO_QUANTIZATION, "8", "4"], value=NO_QUANTIZATION, **_texts("teacher_model_quantization_bit")
        )
        built["teacher_model_device"] = gr.Dropdown(
            choices=[AUTO, "cpu", "cuda:1"],
            value=_default("teacher_model_device"),
            allow_custom_value=True,
            **_texts("teacher_model_device"),
        )

    with gr.Row():
        built["teacher_offload"] = gr.Checkbox(value=_default("teacher_offload"), **_texts("teacher_offload"))
        built["teacher_deepspeed"] = _text("teacher_deepspeed")

    with gr.Row():
        built["kd_beta_end"] = _text("kd_beta_end")
        built["kd_hard_scale"] = gr.Dropdown(
            choices=list(HARD_SCALES), value=_default("kd_hard_scale"), **_texts("kd_hard_scale")
        )
        built["kd_compile"] = gr.Dropdown(choices=list(COMPILE), value=AUTO, **_texts("kd_compile"))

    others = [key for key in KEYS if key not in built]
    for start in range(0, len(others), 3):
        with gr.Row():
            built.update({key: _text(key) for key in others[start : start + 3]})


def _show_by_objective(panel: Panel, shown: gr.Markdown) -> None:
    """Show the chosen objective's equation, and of the fields that only some objectives read those that it reads."""
    objective = panel.fields["kd_loss"]
    dependent = [key for key in panel.fields if any(key in unused_keys(name) for _, name in objective_choices("en"))]

    def update(kd_loss: str) -> list[Any]:
        unused = unused_keys(kd_loss)
        return [equation(kd_loss), *(gr.update(visible=key not in unused) for key in dependent)]

    for key in dependent:
        panel.fields[key].visible = key not in unused_keys(_default("kd_loss"))

    objective.change(update, [objective], [shown, *(panel.fields[key] for key in dependent)], queue=False)


def _default(key: str) -> Any:
    return DistillationArguments.__dataclass_fields__[key].default


def _texts(key: str) -> dict[str, Any]:
    """Label, help and choices until the page's language is known, and for keys that have no label yet."""
    labels = element_labels().get(key)
    if labels is None:
        return {"label": key, "info": DistillationArguments.__dataclass_fields__[key].metadata["help"]}
    return labels["en"]


def _share(key: str, **layout: Any) -> gr.Slider:
    return gr.Slider(minimum=0, maximum=1, step=0.01, value=_default(key), **_texts(key), **layout)


def _text(key: str, value: str | None = None, **layout: Any) -> gr.Textbox:
    """Return a field for text or for a number: Gradio's own number field shows an empty value as 0."""
    default = "" if _default(key) is None else str(_default(key))
    return gr.Textbox(value=default if value is None else value, **_texts(key), **layout)


def equation(kd_loss: str) -> str:
    """Return the loss of one response token as display mathematics in Markdown, empty for a mapping of the user."""
    parts = _EQUATIONS.get(kd_loss)
    return "$$" + r" \qquad ".join(parts) + "$$" if parts else ""


def read_samples(output_dir: Path, steps: int = _STEPS) -> list[list[str]]:
    """Return a row for each sample of the newest steps that a run has written down, the newest first."""
    files = {
        int(found[1]): path
        for path in (output_dir / "samples").glob("step-*.jsonl")
        if (found := re.fullmatch(r"step-(\d+)", path.stem))
    }
    rows = []
    for step in sorted(files, reverse=True)[:steps]:
        for line in filter(None, files[step].read_text(encoding="utf-8").split("\n")):  # a sample may hold U+2028
            entry = {"step": step, **json.loads(line)}
            rows.append([_shown(entry.get(column)) for column in _COLUMNS])
    return rows


def build_samples_table(
    panel: gr.Accordion, inputs: Sequence[Any], output_dir: Callable[..., Path | None]
) -> dict[str, Any]:
    """Build a button and a table at the end of the panel, connect them, and return them by name.

    Args:
        panel: the accordion of our stage.
        inputs: the language's field, then those that ``output_dir`` reads.
        output_dir: from their values to the folder of the run; None where they name none.
    """
    with panel:
        button = gr.Button(**element_labels()["samples_btn"]["en"])
        table = gr.Dataframe(headers=_headers(None), value=[], visible=False, wrap=True, interactive=False)

    def show(language: str | None, *values: Any) -> gr.Dataframe:
        folder = output_dir(*values)
        rows = read_samples(folder) if folder is not None else []
        if not rows:
            gr.Info(words(language)["no_samples"])
        return gr.Dataframe(headers=_headers(language), value=rows, visible=bool(rows))

    button.click(show, list(inputs), [table], queue=False)
    return {"samples_btn": button, "samples_table": table}


def _headers(language: str | None) -> list[str]:
    texts = words(language)
    return [texts[f"sample_{column}"] for column in _COLUMNS]


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
