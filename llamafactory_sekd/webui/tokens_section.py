"""The tab "Token difficulty": one sentence before and after training, each target token colored by its difficulty."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr

from llamafactory_sekd.arguments import KEYS, DistillationArguments
from llamafactory_sekd.data.alma import DEFAULT_OUT, TASKS
from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.data.prompts import prompt_named
from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.errors import DataError, SekdError
from llamafactory_sekd.webui.page import (
    DIRECTIONS,
    Data,
    LoadedModel,
    Page,
    alert,
    check_keys,
    distillation_keys,
    element_labels,
    words,
)
from llamafactory_sekd.webui.token_comparison import Column, Comparison, Token, compare


_PREFIX = "compare_"
# Two hues that color-blind readers tell apart; hard tokens have a line below as well.
_HARD, _EASY = "217, 95, 2", "31, 119, 180"
_STYLE = """<style>
.sekd-view {color: var(--body-text-color); font-size: 14px}
.sekd-view p {margin: 4px 0}
.sekd-view .sekd-columns {display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 12px}
.sekd-view .sekd-column {min-width: 0; padding: 10px; border: 1px solid var(--border-color-primary);
  border-radius: 6px}
.sekd-view h4 {margin: 0 0 2px; font-size: 15px}
.sekd-view .sekd-name, .sekd-view .sekd-note {opacity: 0.75; overflow-wrap: anywhere}
.sekd-view .sekd-translation {overflow-wrap: anywhere; margin: 8px 0}
.sekd-view .sekd-tokens {display: flex; flex-wrap: wrap; gap: 3px; margin-top: 8px}
.sekd-view .sekd-token {display: inline-flex; flex-direction: column; align-items: center; padding: 1px 3px;
  border-radius: 3px; border-bottom: 3px solid transparent; white-space: pre-wrap; overflow-wrap: anywhere}
.sekd-view .sekd-hard {border-bottom-color: rgb(217, 95, 2); font-weight: 600}
.sekd-view .sekd-token small {font-size: 10px; font-weight: 400}
</style>"""


def build_tokens_section(page: Page) -> dict[str, Any]:
    """Build the tab at the page's current place, connect it, and return its elements by name."""
    fields: dict[str, Any] = {}
    with gr.Tab(elem_id="compare_tab", **_texts("tab")) as tab:
        note = gr.Markdown(**_texts("note"))
        with gr.Row():
            fields["direction"] = gr.Dropdown(
                choices=list(DIRECTIONS), value=DIRECTIONS[0], allow_custom_value=True, **_texts("direction")
            )
            fields["task"] = gr.Dropdown(
                choices=list(TASKS), value=next(iter(TASKS)), allow_custom_value=True, **_texts("task")
            )
            fields["task_dir"] = gr.Textbox(value=DEFAULT_OUT, **_texts("task_dir"))
            fields["number"] = gr.Textbox(value="1", **_texts("number"))
            pick = gr.Button(**_texts("pick_btn"))

        with gr.Row():
            fields["prompt"] = gr.Textbox(value="", **_texts("prompt"))
            fields["source"] = gr.Textbox(lines=2, **_texts("source"))
            fields["reference"] = gr.Textbox(lines=2, **_texts("reference"))

        with gr.Row():
            start = gr.Button(variant="primary", **_texts("start_btn"))
            unload = gr.Button(**_texts("unload_btn"))

        view = gr.HTML(elem_id="compare_view")

    events = _Events(page, fields, view)
    everything = {*fields.values(), *page.elements.values()}
    pick.click(events.pick, everything, [fields["source"], fields["reference"]])
    start.click(events.start, everything, [view])
    unload.click(events.unload, [page.elements["top.lang"]], None)
    named = {**fields, "tab": tab, "note": note, "pick_btn": pick, "start_btn": start, "unload_btn": unload}
    return {f"{_PREFIX}{name}": element for name, element in named.items()}


def _texts(name: str) -> dict[str, Any]:
    return element_labels()[f"{_PREFIX}{name}"]["en"]


@dataclass
class _Events:
    page: Page
    fields: Mapping[str, Any]
    view: gr.HTML
    loaded: dict[str, LoadedModel] = field(default_factory=dict)

    def pick(self, data: Data) -> dict[Any, Any]:
        """Copy a sentence of the test set into both text fields."""
        own = self._own(data)
        try:
            test_set = load_test_set(own["task"], own["task_dir"].strip(), own["direction"])
            if not own["number"].strip().isdigit() or not 1 <= int(own["number"]) <= len(test_set.sources):
                raise DataError(
                    f"There is no sentence {own['number']}: the test set has 1 to {len(test_set.sources)}."
                )
        except SekdError as error:
            gr.Warning(str(error))
            return {}

        index = int(own["number"]) - 1
        return {
            self.fields["source"]: test_set.sources[index],
            self.fields["reference"]: test_set.references[index],
        }

    def start(self, data: Data) -> Any:
        """Load what is not loaded yet and show the comparison."""
        values, own = self.page.values(data), self._own(data)
        language = values["top.lang"] or "en"
        source, reference = own["source"].strip(), own["reference"].strip()
        teacher = self.page.teacher_arguments(values)
        error = self._missing(values, source, reference, teacher is None, language)
        if error:
            gr.Warning(error)
            return gr.skip()
        keys = distillation_keys({key: values[f"train.{key}"] for key in KEYS})
        before = self.page.student_arguments(values, None)
        after = self.page.student_arguments(values, values["top.checkpoint_path"])
        try:
            check_keys(keys)
            direction = parse_direction(own["direction"])
            models = self._load([before, after, teacher or {}], values["top.template"])
            objective = DistillationArguments(**keys).objective_keywords()
            prompt = prompt_named(own["prompt"].strip() or None)
            comparison = compare(models, source, reference, direction, objective, prompt)
        except (SekdError, OSError, ValueError, RuntimeError, ImportError) as failure:  # as the loaders raise them
            gr.Warning(_one_line(failure))
            return gr.skip()

        used = ", ".join(f"{key} {value}" for key, value in keys.items() if key in objective)
        return render(comparison, used, words(language))

    def unload(self, language: str) -> None:
        """Free the models."""
        self.loaded.clear()
        _free_memory()
        gr.Info(self.page.alert("info_unloaded", language or "en"))

    def _missing(self, values: Mapping[str, Any], source: str, reference: str, no_teacher: bool, language: str) -> str:
        if self.page.is_demo or not values["top.model_path"]:
            return self.page.alert("err_demo" if self.page.is_demo else "err_no_path", language)
        if not values["top.checkpoint_path"]:
            return alert("no_checkpoint", language)
        if no_teacher:
            return alert("no_teacher", language)
        return "" if source and reference else alert("no_sentence", language)

    def _load(self, arguments: list[dict[str, Any]], template: str) -> list[LoadedModel]:
        """Return the models, in this order; others that were loaded before are freed first."""
        keys = [json.dumps([one, template], sort_keys=True) for one in arguments]
        for stale in set(self.loaded) - set(keys):
            del self.loaded[stale]
            _free_memory()

        for key, one in zip(keys, arguments, strict=True):
            if key not in self.loaded:
                self.loaded[key] = self.page.load(one, template)

        return [self.loaded[key] for key in keys]

    def _own(self, data: Data) -> dict[str, Any]:
        return {name: data[element] for name, element in self.fields.items()}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def render(comparison: Comparison, objective: str, words: Mapping[str, str]) -> str:
    """Return the HTML.

    Args:
        comparison: what to show.
        objective: the keys in words, such as `self_evolution, kd_lambda 0.5`.
        words: the view's words in the language of the page.
    """
    columns = {"before": comparison.before, "after": comparison.after, "teacher": comparison.teacher}
    strongest = max(token.difficulty for column in columns.values() for token in column.tokens)
    return "".join(
        [
            _STYLE,
            '<div class="sekd-view">',
            _line(words["source"], comparison.source),
            _line(words["reference"], comparison.reference),
            _line(words["objective"], objective),
            f'<p class="sekd-note">{_sample(words["hard"], True)} {_sample(words["easy"], False)} ',
            f"{escape(words['legend'])}</p>",
            '<div class="sekd-columns">',
            *(_column(words[role], column, strongest, words) for role, column in columns.items()),
            "</div></div>",
        ]
    )


def _line(name: str, text: str) -> str:
    return f"<p><b>{escape(name)}:</b> {escape(text)}</p>"


def _column(title: str, column: Column, strongest: float, words: Mapping[str, str]) -> str:
    summary = (
        f"{words['difficulty']} {column.mean_difficulty:.2f} · {words['hard_share']} {100 * column.hard_share:.0f} %"
    )
    return (
        f'<div class="sekd-column"><h4>{escape(title)}</h4><div class="sekd-name">{escape(column.name)}</div>'
        f'<p class="sekd-translation"><b>{escape(words["translation"])}:</b> {escape(column.translation)}</p>'
        f"<div>{escape(summary)}</div>"
        f'<div class="sekd-tokens">{"".join(_token(token, strongest, words) for token in column.tokens)}</div></div>'
    )


def _token(token: Token, strongest: float, words: Mapping[str, str]) -> str:
    strength = 0.08 + 0.5 * (token.difficulty / strongest if strongest > 0 else 0.0)
    title = (
        f"{words['hard'] if token.hard else words['easy']} · d {token.difficulty:.3f} · "
        f"−log q {token.student_ce:.3f} · −log p {token.teacher_ce:.3f}"
    )
    # A space would vanish at the edge of its box.
    text = escape(token.text.replace(" ", "\N{OPEN BOX}").replace("\n", "⏎")) or "&nbsp;"
    return (
        f'<span class="sekd-token{" sekd-hard" if token.hard else ""}" title="{escape(title)}" '
        f'style="background: rgba({_HARD if token.hard else _EASY}, {strength:.2f})">{text}'
        f"<small>{token.difficulty:.2f}</small></span>"
    )


def _sample(word: str, hard: bool) -> str:
    return (
        f'<span class="sekd-token{" sekd-hard" if hard else ""}" '
        f'style="background: rgba({_HARD if hard else _EASY}, 0.35)">{escape(word)}</span>'
    )
