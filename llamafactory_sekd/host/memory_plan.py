"""From a training YAML to the planner's description of the run, through the host's own classes and functions."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from llamafactory_sekd.arguments import AUTO, SELF, STAGE
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.host.host_arguments import check_run
from llamafactory_sekd.host.run_arguments import HostArguments, check_teacher_choice, read_deepspeed_file
from llamafactory_sekd.host.teacher_loading import copy_model_arguments, each_teacher, teacher_model_arguments
from llamafactory_sekd.planner.planned_run import Blueprint, Run, Sharding, TeacherPlace, read_deepspeed
from llamafactory_sekd.teacher import common_vocabulary, engine_config


def parse(config: Mapping[str, Any]) -> HostArguments:
    """Parse a training YAML's keys with the host's classes, without asking for the hardware that it names.

    Raises:
        ArgumentError: a key is unknown, or a value cannot be used.
    """
    from llamafactory.hparams import parser
    from transformers import HfArgumentParser

    class TrainingArguments(parser.TrainingArguments):
        def __post_init__(self) -> None:
            """Leave out what looks for devices and starts DeepSpeed."""

    classes = [
        parser.ModelArguments,
        parser.DataArguments,
        TrainingArguments,
        parser.FinetuningArguments,
        parser.GeneratingArguments,
    ]
    try:
        run = HostArguments(*HfArgumentParser(classes).parse_dict(dict(config)))
        parser._verify_model_args(run.model, run.data, run.finetuning)
    except (TypeError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"the host refuses the configuration: {' '.join(str(error).split())}") from error

    if not run.finetuning.use_sekd and run.finetuning.stage != "sft":
        raise ArgumentError(f"`stage: {run.finetuning.stage}` cannot be planned: `sekd doctor` knows {STAGE} and sft.")
    if run.finetuning.use_sekd:
        check_run(SimpleNamespace(**config), machine=False)
        check_teacher_choice(run.data, run.finetuning)

    if run.training.fsdp:
        raise ArgumentError(f"`fsdp: {run.training.fsdp}` cannot be planned: `sekd doctor` knows DDP and DeepSpeed.")
    return run


def run_of(
    run: HostArguments, devices: int, *, accelerator: bool, length: int | None = None, responses: float = 0.5
) -> Run:
    """Describe a run.

    Args:
        run: its arguments.
        devices: how many take part.
        accelerator: whether the devices are accelerators.
        length: tokens of the longest example, None for `cutoff_len`.
        responses: the share of the tokens that belong to responses.

    Raises:
        ArgumentError: a model's or DeepSpeed's configuration cannot be read.
    """
    model, training, finetuning = run.model, run.training, run.finetuning
    student_config = _load_config(model, "model_name_or_path")
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    deepspeed = None if training.deepspeed is None else read_deepspeed_file("deepspeed", training.deepspeed)
    sharding: Sharding | None = None
    engine_dtype = None
    if deepspeed is not None:
        sharding = read_deepspeed(deepspeed, student_config.get_text_config().hidden_size)
        engine_dtype = _engine_dtype(deepspeed, half)

    has_teacher = finetuning.use_sekd and finetuning.teacher_model
    teachers = [_blueprint_of(arguments) for arguments in _teachers_of(run)] if has_teacher else []
    tokens = length or run.data.cutoff_len
    return Run(
        student=Blueprint(
            lambda: _build_student(run, student_config), model.quantization_bit, model.double_quantization
        ),
        teacher=teachers[0] if teachers else None,
        other_teachers=tuple(teachers[1:]),
        distillation=finetuning if finetuning.use_sekd else None,
        batch_size=training.per_device_train_batch_size,
        length=-(-tokens // 8) * 8,  # the host's collator pads to multiples of eight
        responses=responses,
        accumulation=training.gradient_accumulation_steps,
        autocast=half if deepspeed is None and not finetuning.pure_bf16 else None,
        engine_dtype=engine_dtype,
        optimizer=_optimizer(run),
        devices=devices,
        sharding=sharding,
        accelerator=accelerator,
        place=_teacher_place(finetuning, deepspeed, student_config, accelerator) if has_teacher else TeacherPlace(),
    )


def _teacher_place(
    finetuning: Any, deepspeed: dict[str, Any] | None, student_config: Any, accelerator: bool
) -> TeacherPlace:
    if finetuning.teacher_model == SELF:
        folders = [Path(name) for name in (finetuning.teacher_model_adapters or "").split(",") if name]
        files = [path for folder in folders for path in folder.glob("adapter_model.*")]
        return TeacherPlace("student", adapters=sum(path.stat().st_size for path in files))
    offload, device, own = finetuning.teacher_offload, finetuning.teacher_model_device, finetuning.teacher_deepspeed
    sharding = None
    if deepspeed is not None:
        own_config = None if own is None else read_deepspeed_file("teacher_deepspeed", own)
        engine = engine_config(deepspeed, own_config, offload)
        sharding = read_deepspeed(engine, student_config.get_text_config().hidden_size)

    if not accelerator or not (offload or device != AUTO):  # without accelerators all of it is main memory
        return TeacherPlace(sharding=sharding)
    kind = "main memory" if offload or device == "cpu" else "another device"
    return TeacherPlace(kind, streamed=offload, sharding=sharding)


def _optimizer(run: HostArguments) -> str:
    own = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")  # the host's, instead of `optim`
    chosen = next((key.removeprefix("use_") for key in own if getattr(run.finetuning, key, False)), None)
    return chosen or str(getattr(run.training.optim, "value", run.training.optim))


def _teachers_of(run: HostArguments) -> list[Any]:
    return [teacher_model_arguments(one.model, one.finetuning) for one in each_teacher(run)]


def _blueprint_of(arguments: Any) -> Blueprint:
    config = _load_config(arguments, "teacher_model")
    return Blueprint(
        lambda: _build(config, arguments, is_trainable=False),
        arguments.quantization_bit,
        arguments.double_quantization,
    )


def _build_student(run: HostArguments, config: Any) -> nn.Module:
    from llamafactory.model.adapter import init_adapter

    model = _build(config, run.model, is_trainable=True)
    finetuning = copy(run.finetuning)
    finetuning.pissa_init = False  # it would decompose weights; its adapters are of the same size
    arguments = _weightless(run.model)
    arguments.resize_vocab = run.model.resize_vocab  # then LoRA trains the embeddings, too
    return init_adapter(config, model, arguments, finetuning, is_trainable=True)


def _build(config: Any, model_args: Any, is_trainable: bool) -> nn.Module:
    """Return a model as the host's `load_model` makes it, up to the adapters."""
    from llamafactory.model import load_tokenizer
    from llamafactory.model.patcher import patch_config, patch_model
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    arguments = _weightless(model_args)
    patch_config(config, None, arguments, {}, is_trainable)
    composite = type(config) in AutoModelForImageTextToText._model_mapping
    auto_class = AutoModelForImageTextToText if composite else AutoModelForCausalLM
    model = auto_class.from_config(
        config,
        torch_dtype=getattr(config, "torch_dtype", None) or torch.float32,
        trust_remote_code=arguments.trust_remote_code,
    )
    if model_args.resize_vocab:  # as the host does, but for the values of the new rows
        tokens = len(load_tokenizer(model_args)["tokenizer"])
        if tokens > len(model.get_input_embeddings().weight):
            model.resize_token_embeddings(tokens, pad_to_multiple_of=64, mean_resizing=False)

    patch_model(model, None, arguments, is_trainable, add_valuehead=False)
    return model


def _weightless(model_args: Any) -> Any:
    """Return the arguments without what reads weights or needs a device; `lora_rank` gives the adapters' sizes."""
    flash_attn = "sdpa" if str(model_args.flash_attn) == "fa2" else model_args.flash_attn  # as little memory
    return copy_model_arguments(
        model_args, adapter_name_or_path=None, quantization_bit=None, flash_attn=flash_attn, resize_vocab=False
    )


def _load_config(model_args: Any, key: str) -> Any:
    from llamafactory.model import load_config

    try:
        return load_config(model_args)
    except (OSError, ValueError) as error:
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ArgumentError(
            f"`{key}: {model_args.model_name_or_path}` has no configuration that can be read ({lines[0]}): give the "
            f"folder or hub id of a model, or plan with one of its size: sekd doctor X.yaml {key}=PATH"
        ) from error


def _engine_dtype(deepspeed: dict[str, Any], half: torch.dtype | None) -> torch.dtype | None:
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        enabled = deepspeed.get(key, {}).get("enabled", False)
        if enabled is True or (enabled == "auto" and half is dtype):
            return dtype

    return None


def missing_tokenizer(run: HostArguments) -> str:
    """Say which model's tokenizer cannot be read; empty where both can."""
    from llamafactory.model import load_tokenizer

    for who, arguments in (("student", run.model), *(("teacher", teacher) for teacher in _teachers_of(run))):
        try:
            load_tokenizer(arguments)
        except (OSError, ValueError):
            return f"the {who}'s tokenizer cannot be read from {arguments.model_name_or_path}"

    return ""


def vocabulary_line(run: HostArguments) -> str:
    """Return what the objective reads of two heads of different sizes; empty where they are the same.

    Raises:
        TeacherError: a head is smaller than the tokenizer, the tokens of the template included.
    """
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer

    rows = [
        _load_config(arguments, key).get_text_config().vocab_size
        for arguments, key in (
            (run.model, "model_name_or_path"),
            *((teacher, "teacher_model") for teacher in _teachers_of(run)),
        )
    ]
    tokenizer = load_tokenizer(run.model)["tokenizer"]
    get_template_and_fix_tokenizer(tokenizer, run.data)
    return common_vocabulary(tokenizer, *rows)[1]
