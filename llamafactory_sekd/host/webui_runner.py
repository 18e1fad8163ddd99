"""The host's Runner, which previews, starts and watches runs, with our stage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from threading import Lock
from types import SimpleNamespace
from typing import Any

from llamafactory_sekd.arguments import KEYS, SELF, STAGE, cache_folders
from llamafactory_sekd.errors import SekdError


def extend_runner(host_class: type) -> type:
    """Return a subclass of the host's Runner whose runs of our stage carry the panel's keys, checked beforehand."""

    class Runner(host_class):
        __doc__ = host_class.__doc__

        evaluation: Any = None  # the section "Translation quality" puts its process here
        trainer: Any
        finish_info = ""

        def _initialize(self, data: dict[Any, Any], do_train: bool, from_preview: bool) -> str:
            from llamafactory.webui.locales import ALERTS

            from llamafactory_sekd.host.phases import forget_phase

            if self.evaluation is not None and self.evaluation.running:
                return ALERTS["err_conflict"][data[self.manager.get_elem_by_id("top.lang")]]

            error = super()._initialize(data, do_train, from_preview)
            if not error and do_train and self._is_ours(data):
                error = self._refusal(data)
                if not error and not from_preview:
                    forget_phase(self._folder(data))  # of a run that was killed
            return error

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

        def _value(self, data: dict[Any, Any], name: str) -> Any:
            return data[self.manager.get_elem_by_id(name)]

        def _folder(self, data: dict[Any, Any]) -> Path | None:
            from llamafactory_sekd.host.webui_page import output_folder

            names = ("top.model_name", "top.finetuning_type", "train.output_dir")
            return output_folder(*(self._value(data, name) for name in names))

        def _panel_keys(self, data: dict[Any, Any]) -> dict[str, Any]:
            from llamafactory_sekd.host.webui_page import adapter_paths, model_path
            from llamafactory_sekd.webui.panel_settings import distillation_keys

            values = {key: data[self.manager.get_elem_by_id(f"train.{key}")] for key in KEYS}
            teacher = values["teacher_model"]
            values["teacher_model"] = model_path(teacher)
            trained_from = data[self.manager.get_elem_by_id("top.model_name")] if teacher == SELF else teacher
            values["teacher_model_adapters"] = adapter_paths(trained_from, values["teacher_model_adapters"])
            return distillation_keys(values)

        def _refusal(self, data: dict[Any, Any]) -> str:
            from llamafactory_sekd.host.host_arguments import check_run
            from llamafactory_sekd.webui.labels import alert
            from llamafactory_sekd.webui.panel_settings import check_keys

            language, *teachers = (
                data[self.manager.get_elem_by_id(name)]
                for name in ("top.lang", "train.teacher_model", "train.teacher_cache", "train.teacher_server")
            )
            if not any(teachers):
                return alert("no_teacher_or_cache", language)

            if os.getenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
                return "TORCH_DEVICE_BACKEND_AUTOLOAD keeps the plug-in out of the runs started here: unset it."

            args = self._parse_train_args(data)
            try:
                check_keys(args)
                check_run(SimpleNamespace(**args))
                _check_teacher_files(args)
            except SekdError as error:
                return str(error)

            return ""

        def monitor(self) -> Iterator[dict[Any, Any]]:
            if self.trainer is None:  # the run ended while this page was being opened
                return

            if not (self.do_train and self._is_ours(self.running_data)):
                yield from super().monitor()
                return

            from llamafactory_sekd.host.phases import bar_of, first_bar
            from llamafactory_sekd.webui.labels import words

            self.trainer = SharedChild.of(self.trainer)
            output_box, progress_bar = (self.manager.get_elem_by_id(f"train.{name}") for name in _SHOWN_AT_THE_END)
            folder, shown = self._folder(self.running_data), words(self._value(self.running_data, "top.lang"))
            log, bar = "", first_bar(shown)
            try:
                for update in super().monitor():
                    log = update.get(output_box, log)
                    if self.running and not self.aborted:
                        # The host's has the steps of the training alone, and those only once one is logged.
                        bar = bar_of(folder, shown) or bar  # the last one while the run's process ends
                        update = {**update, progress_bar: type(progress_bar)(visible=True, **bar)}
                    yield update
            except AttributeError:
                if self.trainer is not None:
                    raise
                # Another page has seen the end of the run and cleared its traces.
                yield {output_box: f"{self.finish_info}\n\n{log}", progress_bar: type(progress_bar)(visible=False)}

        def _finalize(self, lang: str, finish_info: str) -> None:
            from llamafactory.webui.locales import ALERTS

            self.finish_info = ALERTS["info_aborted"][lang] if self.aborted else finish_info
            super()._finalize(lang, finish_info)

    Runner.__module__ = host_class.__module__
    Runner.__qualname__ = host_class.__qualname__
    return Runner


def _check_teacher_files(args: dict[str, Any]) -> None:
    from llamafactory_sekd.teacher import check_teacher_files
    from llamafactory_sekd.teacher.cache import Manifest

    teacher = args.get("teacher_model")
    if teacher:
        for model in teacher.values() if isinstance(teacher, dict) else [teacher]:
            check_teacher_files(model)
    elif not args.get("teacher_server"):  # with a teacher the cache may be empty
        for folder in cache_folders(args["teacher_cache"]):
            Manifest.load(Path(folder))


_SHOWN_AT_THE_END = ("output_box", "progress_bar")
_OUR_IDS = frozenset(f"train.{key}" for key in KEYS)


class SharedChild:
    """A child process that several pages watch: one of them reads its output, the others get what it read.

    The host lets every page read, and all but one end in an error when the child does: a page that is reloaded while a
    run lasts is such a second page.
    """

    def __init__(self, child: Popen[str]) -> None:
        self.child = child
        self._lock = Lock()
        self._output: tuple[str, str] | None = None

    @classmethod
    def of(cls, child: Any) -> SharedChild:
        """Return the child, shared once."""
        return child if isinstance(child, cls) else cls(child)

    @property
    def pid(self) -> int:
        """Return the child's process id."""
        return self.child.pid

    @property
    def returncode(self) -> int | None:
        """Return the child's exit status, None while it runs."""
        return self.child.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the child's end and return its output; raises :class:`TimeoutExpired` while it lasts."""
        if not self._lock.acquire(timeout=timeout):
            raise TimeoutExpired(self.child.args, timeout)

        try:
            if self._output is None:
                self._output = self.child.communicate(timeout=timeout)
        finally:
            self._lock.release()

        return self._output
