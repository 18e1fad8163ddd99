"""The host's page with our stage: its Runner, which previews, starts and watches runs; models, folders and fields."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from threading import Lock
from types import SimpleNamespace
from typing import Any

from llamafactory.extras.constants import PEFT_METHODS, SUPPORTED_MODELS, TRAINING_STAGES
from llamafactory.webui.common import DEFAULT_SAVE_DIR, get_model_path, get_save_dir, load_config
from llamafactory.webui.control import list_checkpoints
from llamafactory.webui.locales import ALERTS

from llamafactory_sekd.arguments import KEYS, SELF, STAGE, cache_folders
from llamafactory_sekd.errors import SekdError
from llamafactory_sekd.host.host_arguments import check_run
from llamafactory_sekd.host.run_progress import bar_of, first_bar, forget_phase
from llamafactory_sekd.webui.page import LoadedModel, Page, alert, check_keys, distillation_keys, words


_READ_BY_OUR_SECTIONS = (
    "top.lang",
    "top.model_name",
    "top.model_path",
    "top.finetuning_type",
    "top.checkpoint_path",
    "top.quantization_bit",
    "top.quantization_method",
    "top.template",
)
_SHOWN_AT_THE_END = ("output_box", "progress_bar")
_OUR_IDS = frozenset(f"train.{key}" for key in KEYS)


def extend_runner(host_class: type) -> type:
    """Return a subclass of the host's Runner whose runs of our stage carry the panel's keys, checked beforehand."""

    class Runner(host_class):
        __doc__ = host_class.__doc__

        evaluation: Any = None  # the section "Translation quality" puts its process here
        trainer: Any
        finish_info = ""

        def _initialize(self, data: dict[Any, Any], do_train: bool, from_preview: bool) -> str:
            if self.evaluation is not None and self.evaluation.running:
                return ALERTS["err_conflict"][self._value(data, "top.lang")]
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
            stage = data.get(self.manager.get_elem_by_id("train.training_stage"))  # an evaluation has none
            return TRAINING_STAGES.get(stage) == STAGE

        def _value(self, data: dict[Any, Any], name: str) -> Any:
            return data[self.manager.get_elem_by_id(name)]

        def _folder(self, data: dict[Any, Any]) -> Path | None:
            names = ("top.model_name", "top.finetuning_type", "train.output_dir")
            return output_folder(*(self._value(data, name) for name in names))

        def _panel_keys(self, data: dict[Any, Any]) -> dict[str, Any]:
            values = {key: self._value(data, f"train.{key}") for key in KEYS}
            teacher = values["teacher_model"]
            values["teacher_model"] = model_path(teacher)
            trained_from = self._value(data, "top.model_name") if teacher == SELF else teacher
            values["teacher_model_adapters"] = adapter_paths(trained_from, values["teacher_model_adapters"])
            return distillation_keys(values)

        def _refusal(self, data: dict[Any, Any]) -> str:
            language, *teachers = (
                self._value(data, name)
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
            self.finish_info = ALERTS["info_aborted"][lang] if self.aborted else finish_info
            super()._finalize(lang, finish_info)

    Runner.__module__ = host_class.__module__
    Runner.__qualname__ = host_class.__qualname__
    return Runner


def _check_teacher_files(args: dict[str, Any]) -> None:
    from llamafactory_sekd.teacher import check_teacher_files
    from llamafactory_sekd.teacher.cache.cache_manifest import Manifest

    teacher = args.get("teacher_model")
    if teacher:
        for model in teacher.values() if isinstance(teacher, dict) else [teacher]:
            check_teacher_files(model)
    elif not args.get("teacher_server"):  # with a teacher the cache may be empty
        for folder in cache_folders(args["teacher_cache"]):
            Manifest.load(Path(folder))


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


def model_path(name: str | None) -> str | None:
    """Return the host's path of a model in its list; anything else is a path already."""
    return get_model_path(name) if name in SUPPORTED_MODELS else name


def adapter_paths(model: str | None, adapters: list[str] | None) -> list[str]:
    """Return the paths of adapters that were trained from a model."""
    return [str(get_save_dir(_folder_of(model), "lora", adapter)) for adapter in adapters or []]


def list_teachers() -> list[str]:
    """Complete models anywhere below the host's folder of checkpoints first, then the models of the host's list."""
    weights = ("model*.safetensors", "pytorch_model*.bin")
    folders = sorted(path.parent for path in Path(DEFAULT_SAVE_DIR).rglob("config.json"))
    tuned = [str(folder) for folder in folders if any(next(folder.glob(name), None) for name in weights)]
    return [*tuned, *SUPPORTED_MODELS]


def list_adapters(teacher: str | None) -> list[str]:
    """Return the adapters that were trained from a teacher."""
    return _checkpoints(_folder_of(teacher), "lora")


def output_folder(model: str | None, finetuning_type: str | None, name: str | None) -> Path | None:
    """Return where the host writes a run of these fields; None where one is empty."""
    return Path(get_save_dir(model, finetuning_type, name)) if model and finetuning_type and name else None


def page_of(engine: Any) -> Page:
    """Return what the page around our sections offers; the training tab must have been built."""
    names = (*_READ_BY_OUR_SECTIONS, *(f"train.{key}" for key in KEYS))
    return Page(
        elements={name: engine.manager.get_elem_by_id(name) for name in names},
        list_checkpoints=lambda model, finetuning_type: _checkpoints(model, finetuning_type),
        student_arguments=_student_arguments,
        teacher_arguments=_teacher_arguments,
        is_demo=engine.demo_mode,
        is_busy=lambda: engine.runner.running,
        load=_load,
        alert=lambda name, language: ALERTS[name][language],
    )


def _folder_of(model: str | None) -> str:
    """Return the name under which the host saves what is trained from a model."""
    return model if model is not None and model in SUPPORTED_MODELS else "Custom"


def _checkpoints(model: str | None, finetuning_type: str) -> list[str]:
    return [value for _, value in list_checkpoints(model, finetuning_type).choices]


def _student_arguments(values: Mapping[str, Any], checkpoint: str | list[str] | None) -> dict[str, Any]:
    arguments = {"model_name_or_path": values["top.model_path"], **_shared_arguments()}
    if checkpoint:
        checkpoints = [checkpoint] if isinstance(checkpoint, str) else checkpoint
        finetuning_type = values["top.finetuning_type"]
        paths = [str(get_save_dir(values["top.model_name"], finetuning_type, name)) for name in checkpoints]
        key = "adapter_name_or_path" if finetuning_type in PEFT_METHODS else "model_name_or_path"
        arguments[key] = ",".join(paths)

    if values["top.quantization_bit"] != "none":
        arguments["quantization_bit"] = int(values["top.quantization_bit"])
        arguments["quantization_method"] = values["top.quantization_method"]

    return arguments


def _teacher_arguments(values: Mapping[str, Any]) -> dict[str, Any] | None:
    name = values["train.teacher_model"]
    if not name:
        return None
    is_shared = name == SELF
    arguments: dict[str, Any] = {"model_name_or_path": model_path(name)}
    if is_shared:
        arguments = _student_arguments(values, None)

    arguments.update(_shared_arguments())
    trained_from = values["top.model_name"] if is_shared else name
    if adapters := adapter_paths(trained_from, values["train.teacher_model_adapters"]):
        arguments["adapter_name_or_path"] = ",".join(adapters)

    if not is_shared and values["train.teacher_model_quantization_bit"] != "none":
        arguments["quantization_bit"] = int(values["train.teacher_model_quantization_bit"])

    return arguments


def _shared_arguments() -> dict[str, Any]:
    """Return what the host's page gives to every model that it loads."""
    cache_dir = load_config().get("cache_dir")
    return {"trust_remote_code": True, **({"cache_dir": cache_dir} if cache_dir else {})}


def _load(arguments: dict[str, Any], template_name: str) -> LoadedModel:
    """Load a model as the host's chat does."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_infer_args
    from llamafactory.model import load_model, load_tokenizer

    model_args, data_args, finetuning_args, _ = get_infer_args({**arguments, "template": template_name})
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)

    def encode(message: str, response: str) -> tuple[list[int], list[int]]:
        turns = [{"role": "user", "content": message}, {"role": "assistant", "content": response}]
        prompt_ids, response_ids = template.encode_oneturn(tokenizer, turns)
        # Such templates leave the end token to the data pipeline.
        return prompt_ids, response_ids + ([tokenizer.eos_token_id] if template.efficient_eos else [])

    return LoadedModel(
        name=", ".join(
            str(arguments[key]) for key in ("model_name_or_path", "adapter_name_or_path") if key in arguments
        ),
        tokenizer=tokenizer,
        model=load_model(tokenizer, model_args, finetuning_args, is_trainable=False),
        encode=encode,
        stop_ids=template.get_stop_token_ids(tokenizer),
    )
