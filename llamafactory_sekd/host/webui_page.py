"""What our part of the page needs of the host: its model list, its folders, its fields, its messages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamafactory.extras.constants import PEFT_METHODS, SUPPORTED_MODELS
from llamafactory.webui.common import DEFAULT_SAVE_DIR, get_model_path, get_save_dir, load_config
from llamafactory.webui.locales import ALERTS

from llamafactory_sekd.arguments import SELF
from llamafactory_sekd.webui.page import LoadedModel, Page


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
    from llamafactory_sekd.arguments import KEYS

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
    from llamafactory.webui.control import list_checkpoints

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
