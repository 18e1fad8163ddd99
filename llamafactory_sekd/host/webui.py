"""LLaMA Board with our stage: the host's training tab, runner, labels and loss curve, each with our part added."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any


def extend_create_train_tab(host_create: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Wrap ``create_train_tab``: our panel comes after the RLHF panel and its fields go where the tab's fields go."""

    @wraps(host_create)
    def create_train_tab(engine: Any) -> dict[str, Any]:
        from gradio.context import Context

        from llamafactory_sekd.host.patches import STAGE_LABEL
        from llamafactory_sekd.host.served_teacher import server_problem
        from llamafactory_sekd.host.webui_page import list_adapters, list_teachers, output_folder
        from llamafactory_sekd.webui.panel import build_panel, build_samples_table

        panel = build_panel()
        with _base_elements_with(engine.manager, panel.fields.values()):
            elements = host_create(engine)

        _move_after(Context.block, panel.accordion, elements["rlhf_tab"])
        elements["training_stage"].scale = 2  # our stage's name is the longest
        student = engine.manager.get_elem_by_id("top.model_path")
        panel.connect(elements["training_stage"], STAGE_LABEL, list_teachers, list_adapters, student, server_problem)
        top = [engine.manager.get_elem_by_id(f"top.{name}") for name in ("lang", "model_name", "finetuning_type")]
        samples = build_samples_table(panel.accordion, [*top, elements["output_dir"]], output_folder)
        return {**elements, **panel.elements(), **samples}

    return create_train_tab


def extend_change_stage(host_change: Callable[..., tuple[Any, bool]]) -> Callable[..., tuple[Any, bool]]:
    """Wrap ``change_stage``, which clears the data sets: a loaded configuration of our stage keeps those it names."""

    @wraps(host_change)
    def change_stage(training_stage: str) -> tuple[Any, bool]:
        import gradio as gr

        from llamafactory_sekd.host.patches import STAGE_LABEL

        datasets, packing = host_change(training_stage)
        return gr.update() if training_stage == STAGE_LABEL else datasets, packing

    return change_stage


def extend_create_eval_tab(host_create: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Wrap ``create_eval_tab``: the tab "Translation quality" follows it."""

    def build(engine: Any, page: Any) -> dict[str, Any]:
        from llamafactory_sekd.webui.quality_section import build_quality_section

        section = build_quality_section(page)
        engine.runner.evaluation = section.process
        return section.elements

    return _with_a_tab_of_ours(host_create, build)


def extend_create_infer_tab(host_create: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Wrap ``create_infer_tab``: the tab "Token difficulty" follows the chat's tab."""

    def build(_: Any, page: Any) -> dict[str, Any]:
        from llamafactory_sekd.webui.tokens_section import build_tokens_section

        return build_tokens_section(page)

    return _with_a_tab_of_ours(host_create, build)


def _with_a_tab_of_ours(
    host_create: Callable[[Any], dict[str, Any]], build: Callable[[Any, Any], dict[str, Any]]
) -> Callable[[Any], dict[str, Any]]:
    """Wrap the function that fills a tab: ``build``, from engine and page to elements, adds another one after it."""

    @wraps(host_create)
    def create_tab(engine: Any) -> dict[str, Any]:
        from gradio.context import Context

        from llamafactory_sekd.host.webui_page import page_of

        elements, tab = host_create(engine), Context.block
        Context.block = tab.parent  # type: ignore[union-attr]  # new components go next to the tab
        try:
            return {**elements, **build(engine, page_of(engine))}
        finally:
            Context.block = tab

    return create_tab


@contextmanager
def _base_elements_with(manager: Any, fields: Collection[Any]) -> Iterator[None]:
    """For the duration, the elements that every tab starts from include ours: so they reach the tab's buttons."""
    host_get = manager.get_base_elems
    manager.get_base_elems = lambda: host_get() | set(fields)
    try:
        yield
    finally:
        del manager.get_base_elems


def _move_after(parent: Any, element: Any, place: Any) -> None:
    parent.children.remove(element)
    parent.children.insert(parent.children.index(place) + 1, element)


def extend_locales(host_locales: dict[str, Any]) -> dict[str, Any]:
    """Return the host's labels with ours."""
    from llamafactory_sekd.webui.page import element_labels

    return {**host_locales, **element_labels()}


def extend_loss_plot(host_plot: Callable[[list[dict[str, Any]]], Any]) -> Callable[[list[dict[str, Any]]], Any]:
    """Wrap ``gen_loss_plot``: where the log has distillation metrics they are drawn below the loss."""

    @wraps(host_plot)
    def gen_loss_plot(trainer_log: list[dict[str, Any]]) -> Any:
        figure = host_plot(trainer_log)
        add_distillation_axes(figure, trainer_log)
        return figure

    return gen_loss_plot


def add_distillation_axes(figure: Any, trainer_log: Sequence[Mapping[str, Any]]) -> None:
    """Draw hard share and mean difficulty below the loss, the NLL of a validation over it.

    A log without these metrics leaves the figure as it is.

    Args:
        figure: the host's figure, with one pair of axes.
        trainer_log: the records of ``trainer_log.jsonl``.
    """
    from llamafactory_sekd.reporting.figures import draw_gate, draw_validation

    records = [record for record in trainer_log if "kd/hard_ratio" in record]
    if not records:
        return
    grid = figure.add_gridspec(2, 1)
    loss = figure.axes[0]
    loss.set_subplotspec(grid[0])
    figure.set_size_inches(4.8, 6.4)  # narrow, as its place in the page is, so that the letters stay legible
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.95))  # the page puts a label into the upper corner

    if nll := [(record["current_steps"], record["eval_kd/ce"]) for record in trainer_log if "eval_kd/ce" in record]:
        draw_validation(loss, nll)
    draw_gate(
        figure.add_subplot(grid[1], sharex=loss),
        [record["current_steps"] for record in records],
        [record["kd/hard_ratio"] for record in records],
        [record["kd/difficulty"] for record in records],
    )
