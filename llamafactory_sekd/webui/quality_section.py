"""The tab "Translation quality": `llamafactory-cli eval` from the page."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from llamafactory_sekd.data.alma import DEFAULT_OUT, TASKS
from llamafactory_sekd.errors import SekdError
from llamafactory_sekd.evaluation.evaluation_settings import METRICS
from llamafactory_sekd.webui.evaluation_process import (
    BASE,
    TEACHER,
    EvaluationProcess,
    as_yaml,
    check_config,
    checkpoint_list,
    draw_report,
    evaluation_config,
    follow_test_set,
    read_report,
    report_files,
    results_folder,
    system_names,
)
from llamafactory_sekd.webui.page import DIRECTIONS, Data, Page, alert, element_labels


_PREFIX = "quality_"
_SECONDS_BETWEEN_UPDATES = 1.0


@dataclass(frozen=True)
class QualitySection:
    """The section: its elements by name, for the host's manager, and its process."""

    elements: dict[str, Any]
    process: EvaluationProcess


def build_quality_section(page: Page) -> QualitySection:
    """Build the section at the page's current place, and connect it."""
    fields: dict[str, Any] = {}
    with gr.Tab(elem_id="quality_tab", **_texts("tab")) as tab:
        with gr.Row():
            fields["task"] = gr.Dropdown(
                choices=list(TASKS), value=next(iter(TASKS)), allow_custom_value=True, **_texts("task")
            )
            fields["task_dir"] = gr.Textbox(value=DEFAULT_OUT, **_texts("task_dir"))
            fields["directions"] = gr.Dropdown(
                choices=list(DIRECTIONS),
                value=list(DIRECTIONS),
                multiselect=True,
                allow_custom_value=True,
                scale=2,
                **_texts("directions"),
            )

        with gr.Row():
            fields["checkpoints"] = gr.Dropdown(
                multiselect=True, allow_custom_value=True, scale=3, **_texts("checkpoints")
            )
            with gr.Column():
                fields["with_base"] = gr.Checkbox(value=True, **_texts("with_base"))
                fields["with_teacher"] = gr.Checkbox(value=False, **_texts("with_teacher"))
            fields["baseline"] = gr.Dropdown(
                choices=["", BASE], allow_custom_value=True, value="", scale=2, **_texts("baseline")
            )

        with gr.Row():
            fields["metrics"] = gr.Dropdown(
                choices=[name for name in (*METRICS, "comet?") if name != "metricx"],  # its model is named in a file
                value=["bleu", "chrf", "comet?"],
                multiselect=True,
                scale=4,
                **_texts("metrics"),
            )
            fields["comet_model"] = gr.Textbox(value="Unbabel/wmt22-comet-da", scale=3, **_texts("comet_model"))
            fields["save_dir"] = gr.Textbox(value=results_folder(next(iter(TASKS))), scale=3, **_texts("save_dir"))

        with gr.Row():
            fields["prompt"] = gr.Textbox(value="", scale=4, **_texts("prompt"))
            fields["num_beams"] = gr.Slider(minimum=1, maximum=16, value=1, step=1, scale=3, **_texts("num_beams"))
            fields["max_new_tokens"] = gr.Slider(
                minimum=8, maximum=4096, value=256, step=1, scale=3, **_texts("max_new_tokens")
            )

        with gr.Row():
            preview = gr.Button(**_texts("preview_btn"))
            start = gr.Button(variant="primary", **_texts("start_btn"))
            stop = gr.Button(variant="stop", **_texts("stop_btn"))

        bar = gr.Slider(visible=False, interactive=False, minimum=0, maximum=100)
        output = gr.Markdown()
        plot = gr.Plot(visible=False, **_texts("plot"))
        files = gr.File(visible=False, interactive=False, file_count="multiple", **_texts("files"))
        report = gr.Markdown(visible=False, latex_delimiters=[], elem_id="quality_report")

    process = EvaluationProcess()
    events = _Events(page, fields, process, bar, output, plot, files, report)
    everything = {*fields.values(), *page.elements.values()}
    shown = [bar, output, plot, files, report]
    fields["checkpoints"].focus(events.list_checkpoints, everything, [fields["checkpoints"]], queue=False)
    systems = [fields[name].change for name in ("checkpoints", "with_base", "with_teacher")]
    gr.on(systems, events.list_systems, everything, [fields["baseline"]], queue=False)
    # A checkpoint that is chosen for the page is the one to evaluate.
    chosen: Any = page.elements["top.checkpoint_path"]
    chosen.change(checkpoint_list, [chosen], [fields["checkpoints"]], queue=False)
    # In the page, as the folder is: a gr.State would be ahead of it where two changes follow each other quickly.
    followed = gr.Textbox(value=fields["save_dir"].value, visible=False)
    folder = [fields["save_dir"], followed]
    fields["task"].change(follow_test_set, [fields["task"], *folder], folder, queue=False)
    preview.click(events.preview, everything, shown, concurrency_limit=None)
    start.click(events.start, everything, shown)
    stop.click(process.stop, queue=False)
    _on_load(events.resume, [page.elements["top.lang"]], shown)

    named = {**fields, "tab": tab, "preview_btn": preview, "start_btn": start, "stop_btn": stop}
    named.update(plot=plot, files=files)
    return QualitySection({f"{_PREFIX}{name}": element for name, element in named.items()}, process)


def _on_load(function: Any, inputs: list[Any], outputs: list[Any]) -> None:
    """Call a function when a page is opened."""
    from gradio.context import Context

    assert Context.root_block is not None  # components exist in a page only
    Context.root_block.load(function, inputs, outputs, concurrency_limit=None)


def _texts(name: str) -> dict[str, Any]:
    return element_labels()[f"{_PREFIX}{name}"]["en"]


@dataclass(frozen=True)
class _Events:
    page: Page
    fields: Mapping[str, Any]
    process: EvaluationProcess
    bar: gr.Slider
    output: gr.Markdown
    plot: gr.Plot
    files: gr.File
    report: gr.Markdown

    def list_checkpoints(self, data: Data) -> gr.Dropdown:
        values = self.page.values(data)
        found = self.page.list_checkpoints(values["top.model_name"], values["top.finetuning_type"])
        return gr.Dropdown(choices=found)

    def list_systems(self, data: Data) -> gr.Dropdown:
        return gr.Dropdown(choices=["", *self._names(data)])

    def preview(self, data: Data) -> dict[Any, Any]:
        config, error = self._config(data)
        if error:
            return self._warn(error)
        path = self.process.config_path(Path(config["save_dir"]))
        return {self.output: f"```bash\nllamafactory-cli eval {path}\n```\n\n```yaml\n# {path}\n{as_yaml(config)}```"}

    def start(self, data: Data) -> Iterator[dict[Any, Any]]:
        language = self._language(data)
        config, error = self._config(data)
        if not error and self.page.is_demo:
            error = self.page.alert("err_demo", language)
        if not error and (self.page.is_busy() or self.process.running):
            error = self.page.alert("err_conflict", language)
        if error:
            yield self._warn(error)
            return
        yield {part: gr.update(visible=False) for part in (self.plot, self.files, self.report)}
        self.process.start(as_yaml(config), Path(config["save_dir"]))
        yield from self._watch(language)

    def resume(self, language: str) -> Iterator[dict[Any, Any]]:
        """Show a running evaluation in a page that was opened meanwhile."""
        if self.process.running:
            yield from self._watch(language)
        else:
            yield {self.output: gr.skip()}

    def _watch(self, language: str) -> Iterator[dict[Any, Any]]:
        while self.process.running:
            yield {self.output: self._log(), self.bar: self._progress()}
            time.sleep(_SECONDS_BETWEEN_UPDATES)

        hidden = {self.bar: gr.Slider(visible=False)}
        assert self.process.save_dir is not None
        if self.process.return_code != 0:
            name = "info_aborted" if self.process.stopped else "err_failed"
            message = self.page.alert(name, language)
            gr.Info(message) if self.process.stopped else gr.Warning(message)
            yield {**hidden, self.output: f"{message}\n\n{self._log()}"}
            return
        message = self.page.alert("info_finished", language)
        gr.Info(message)
        paths = report_files(self.process.save_dir)
        yield {
            **hidden,
            self.output: f"{message} `{self.process.save_dir / 'report.html'}`",
            self.files: gr.File(paths or None, visible=bool(paths)),
            self.plot: gr.Plot(draw_report(self.process.save_dir), visible=True),
            self.report: gr.Markdown(read_report(self.process.save_dir), visible=True),
        }

    def _log(self) -> str:
        lines = [line for line in self.process.output() if line.strip()][-15:]
        return "```text\n" + "\n".join(lines).replace("```", "'''") + "\n```" if lines else "…"

    def _progress(self) -> gr.Slider:
        progress = self.process.progress()
        if progress is None or not progress.total:
            return gr.Slider(visible=False)
        percentage = round(100 * progress.done / progress.total, 1)
        return gr.Slider(label=f"{progress.label}: {progress.done}/{progress.total}", value=percentage, visible=True)

    def _names(self, data: Data) -> dict[str, str | None]:
        fields = self.fields
        return system_names(data[fields["checkpoints"]] or [], data[fields["with_base"]], data[fields["with_teacher"]])

    def _language(self, data: Data) -> str:
        return self.page.values(data)["top.lang"] or "en"

    def _config(self, data: Data) -> tuple[dict[str, Any], str]:
        """Return the YAML's keys, and what is wrong with them in the language of the page ("" where nothing is)."""
        values, language = self.page.values(data), self._language(data)
        if not values["top.model_path"]:
            return {}, self.page.alert("err_no_path", language)
        systems: dict[str, Any] = {}
        for name, checkpoint in self._names(data).items():
            arguments = self.page.teacher_arguments(values) if name == TEACHER else None
            if name == TEACHER and arguments is None:
                return {}, alert("no_teacher", language)
            systems[name] = arguments or self.page.student_arguments(values, checkpoint)

        own = {name: data[field] for name, field in self.fields.items()}
        config = evaluation_config(own, systems, values["top.template"])
        try:
            check_config(config)
        except SekdError as error:
            return {}, str(error)

        return config, ""

    def _warn(self, error: str) -> dict[Any, Any]:
        gr.Warning(error)
        return {self.output: error}
