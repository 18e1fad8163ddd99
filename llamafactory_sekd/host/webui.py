"""LLaMA Board with our stage: the host's training tab, runner, labels and loss curve, each with our part added."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

from ..arguments import KEYS, STAGE
from ..errors import SekdError


def extend_create_train_tab(host_create: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Wrap ``create_train_tab``: our panel stands after the RLHF panel and its fields go where the tab's fields go."""

    @wraps(host_create)
    def create_train_tab(engine: Any) -> dict[str, Any]:
        from gradio.context import Context

        from ..webui.panel import build_panel
        from .patches import STAGE_LABEL
        from .webui_page import list_adapters, list_teachers

        panel = build_panel()
        with _base_elements_with(engine.manager, panel.fields.values()):
            elements = host_create(engine)

        _move_after(Context.block, panel.accordion, elements["rlhf_tab"])
        panel.show_for(elements["training_stage"], STAGE_LABEL)
        panel.suggest(list_teachers, list_adapters)
        return {**elements, **panel.elements()}

    return create_train_tab


def extend_change_stage(host_change: Callable[..., tuple[Any, bool]]) -> Callable[..., tuple[Any, bool]]:
    """Wrap ``change_stage``, which clears the data sets: a loaded configuration of our stage keeps those it names."""

    @wraps(host_change)
    def change_stage(training_stage: str) -> tuple[Any, bool]:
        import gradio as gr

        from .patches import STAGE_LABEL

        datasets, packing = host_change(training_stage)
        return gr.update() if training_stage == STAGE_LABEL else datasets, packing

    return change_stage


def extend_create_eval_tab(host_create: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Wrap ``create_eval_tab``: the section "Translation quality" stands below the host's fields."""

    @wraps(host_create)
    def create_eval_tab(engine: Any) -> dict[str, Any]:
        from ..webui.quality import build_quality_section
        from .webui_page import page_of

        elements = host_create(engine)
        section = build_quality_section(page_of(engine))
        engine.runner.evaluation = section.process
        return {**elements, **section.elements}

    return create_eval_tab


def extend_create_infer_tab(host_create: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Wrap ``create_infer_tab``: the tab "Token difficulty" follows the chat's tab."""

    @wraps(host_create)
    def create_infer_tab(engine: Any) -> dict[str, Any]:
        from ..webui.tokens import build_tokens_section
        from .webui_page import page_of

        elements = host_create(engine)
        with _beside_this_tab():
            ours = build_tokens_section(page_of(engine))

        return {**elements, **ours}

    return create_infer_tab


@contextmanager
def _beside_this_tab() -> Iterator[None]:
    """For the duration, new components go where the tab stands that is being filled."""
    from gradio.context import Context

    tab = Context.block
    Context.block = tab.parent  # type: ignore[union-attr]
    try:
        yield
    finally:
        Context.block = tab


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


def extend_runner(host_class: type) -> type:
    """Return a subclass of the host's Runner whose runs of our stage carry the panel's keys, checked beforehand."""

    class Runner(host_class):
        __doc__ = host_class.__doc__

        evaluation: Any = None  # the section "Translation quality" puts its process here

        def _initialize(self, data: dict[Any, Any], do_train: bool, from_preview: bool) -> str:
            from llamafactory.webui.locales import ALERTS

            if self.evaluation is not None and self.evaluation.running:
                return ALERTS["err_conflict"][data[self.manager.get_elem_by_id("top.lang")]]

            error = super()._initialize(data, do_train, from_preview)
            return error or (self._refusal(data) if do_train and self._is_ours(data) else "")

        def _parse_train_args(self, data: dict[Any, Any]) -> dict[str, Any]:
            args = super()._parse_train_args(data)
            if args["stage"] != STAGE:
                return args

            ours = self._panel_keys(data)
            return {**args, **{key: value for key, value in ours.items() if key not in args}}  # extra arguments win

        def _build_config_dict(self, data: dict[Any, Any]) -> dict[str, Any]:
            config = super()._build_config_dict(data)
            if self._is_ours(data):
                return config

            # A host without the plug-in cannot load a configuration that names our fields.
            return {name: value for name, value in config.items() if name not in _OUR_IDS}

        def _is_ours(self, data: dict[Any, Any]) -> bool:
            from llamafactory.extras.constants import TRAINING_STAGES

            stage = data.get(self.manager.get_elem_by_id("train.training_stage"))  # an evaluation has none
            return TRAINING_STAGES.get(stage) == STAGE

        def _panel_keys(self, data: dict[Any, Any]) -> dict[str, Any]:
            from ..webui.settings import distillation_keys
            from .webui_page import adapter_paths, model_path

            values = {key: data[self.manager.get_elem_by_id(f"train.{key}")] for key in KEYS}
            teacher = values["teacher_model"]
            values["teacher_model"] = model_path(teacher)
            values["teacher_model_adapters"] = adapter_paths(teacher, values["teacher_model_adapters"])
            return distillation_keys(values)

        def _refusal(self, data: dict[Any, Any]) -> str:
            from ..teacher import check_teacher_files
            from ..webui.labels import alert
            from ..webui.settings import check_keys
            from .arguments import check_run

            if not data[self.manager.get_elem_by_id("train.teacher_model")]:
                return alert("no_teacher", data[self.manager.get_elem_by_id("top.lang")])

            if os.getenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
                return "TORCH_DEVICE_BACKEND_AUTOLOAD keeps the plug-in out of the runs started here: unset it."

            args = self._parse_train_args(data)
            try:
                check_keys(args)
                check_run(SimpleNamespace(**args))
                check_teacher_files(args["teacher_model"])
            except SekdError as error:
                return str(error)

            return ""

    Runner.__module__ = host_class.__module__
    Runner.__qualname__ = host_class.__qualname__
    return Runner


_OUR_IDS = frozenset(f"train.{key}" for key in KEYS)


def extend_locales(host_locales: dict[str, Any]) -> dict[str, Any]:
    """The host's labels with ours."""
    from ..webui.labels import element_labels

    return {**host_locales, **element_labels()}


def extend_loss_plot(host_plot: Callable[[list[dict[str, Any]]], Any]) -> Callable[[list[dict[str, Any]]], Any]:
    """Wrap ``gen_loss_plot``: where the log has distillation metrics they are drawn below the loss."""

    @wraps(host_plot)
    def gen_loss_plot(trainer_log: list[dict[str, Any]]) -> Any:
        from ..webui.curves import add_distillation_axes

        figure = host_plot(trainer_log)
        add_distillation_axes(figure, trainer_log)
        return figure

    return gen_loss_plot
