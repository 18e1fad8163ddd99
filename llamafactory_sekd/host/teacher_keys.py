"""The teacher's keys of a run: whose teacher each is, where it is placed, and what they cannot be combined with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llamafactory_sekd.arguments import AUTO, SELF, DistillationArguments
from llamafactory_sekd.errors import ArgumentError, one_line
from llamafactory_sekd.host.run_arguments import HostArguments


def names_of_data_sets(value: Any) -> list[str]:
    """Return the names that `dataset` or `eval_dataset` holds, as a list or separated by commas."""
    names = value if isinstance(value, list) else str(value or "").split(",")
    return [str(name).strip() for name in names if str(name).strip()]


def check_teacher_of_each(key: str, teachers: Mapping[str, str], dataset: Any, eval_dataset: Any) -> None:
    """Check that every data set of a run has a teacher, and every teacher a data set.

    Raises:
        ArgumentError: one has none.
    """
    names = names_of_data_sets(dataset) + names_of_data_sets(eval_dataset)
    for name in names:
        if name not in teachers:
            raise ArgumentError(f"the data set {name} has no teacher: name its model under `{key}`.")

    for name in teachers:
        if name not in names:
            raise ArgumentError(
                f"`{key}.{name}` is no data set of this YAML, which has {', '.join(names)}: correct the name."
            )


def check_teacher_choice(data_args: Any, finetuning_args: Any) -> None:
    """Check a run's data against its ``teacher_model``, where that is one for each data set.

    Raises:
        ArgumentError: a data set has no teacher, or the data do not tell which set an example is from.
    """
    teachers = finetuning_args.teacher_model
    if not isinstance(teachers, Mapping):
        return

    if data_args.tokenized_path:
        raise ArgumentError(
            f"`tokenized_path: {data_args.tokenized_path}` does not tell which data set an example is from, and "
            "`teacher_model` is one for each: remove it, or use `teacher_cache`."
        )
    check_teacher_of_each("teacher_model", teachers, data_args.dataset, data_args.eval_dataset)


def own_device(finetuning_args: DistillationArguments) -> torch.device | None:
    """Return the teacher's own device, None where it shares the student's."""
    name = finetuning_args.teacher_model_device
    return None if name == AUTO else torch.device(name)


def check_placement(run: HostArguments) -> None:
    """Check where the teacher shall be placed against how the student is trained.

    Each of the run's objects may be one that holds the keys of a YAML file and no others.

    Raises:
        ArgumentError: the two cannot be combined.
    """
    stage, fsdp, finetuning_args = _zero_stage(run.training), _uses_fsdp(run.training), run.finetuning
    if getattr(finetuning_args, "teacher_model", None) == SELF:
        _check_shared(run.model, finetuning_args, fsdp)

    device = getattr(finetuning_args, "teacher_model_device", AUTO)
    if device != AUTO and (stage == 3 or fsdp):
        engine = "FSDP" if fsdp else "ZeRO-3"
        raise ArgumentError(
            f"`teacher_model_device: {device}` cannot be used: {engine} shards the teacher over all ranks, as it does "
            "the student: remove the key, or train with DDP or ZeRO-2."
        )

    if getattr(finetuning_args, "teacher_offload", False) and fsdp:
        raise ArgumentError(
            "`teacher_offload: true` cannot be used with FSDP: set `fsdp_offload_params: true` in its configuration."
        )

    own = getattr(finetuning_args, "teacher_deepspeed", None)
    if own is not None:
        _check_own_engine(own, stage)


def check_devices(finetuning_args: Any) -> None:
    """Check that the device of the teacher's own exists here.

    Raises:
        ArgumentError: it does not.
    """
    name = str(getattr(finetuning_args, "teacher_model_device", AUTO))
    count = torch.cuda.device_count()
    if name.startswith("cuda:") and int(name.removeprefix("cuda:")) >= count:
        there = f"cuda:0 to cuda:{count - 1}" if count else "no CUDA device"
        raise ArgumentError(
            f"`teacher_model_device: {name}` does not exist, this machine has {there}: choose one that it has, cpu, "
            f"or {AUTO}."
        )


def check_quantizing(given: str, bits: int | None, method: Any = "bnb") -> None:
    """Check that what quantizes a teacher is installed; bitsandbytes computes on a CPU as well.

    Args:
        given: the key or option with its value, for the message.
        bits: its value.
        method: the host's `quantization_method`; of others than bitsandbytes the host knows what they need.

    Raises:
        ArgumentError: it is not.
    """
    if bits is None or getattr(method, "value", method) not in ("bnb", None) or find_spec("bitsandbytes") is not None:
        return
    raise ArgumentError(
        f"`{given}` needs the package bitsandbytes, which is not installed: `pip install bitsandbytes`, or remove it "
        "to load the teacher unquantized."
    )


def read_deepspeed_file(key: str, source: str | Mapping[str, Any]) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Raises:
        ArgumentError: it cannot be read, or is no JSON object.
    """
    if isinstance(source, Mapping):
        return dict(source)

    try:
        config = json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"`{key}: {source}` cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ArgumentError(f"`{key}: {source}` is not JSON: {one_line(str(error))}.") from error

    if not isinstance(config, dict):
        raise ArgumentError(f"`{key}: {source}` is not a DeepSpeed configuration: it must hold a JSON object.")

    return config


def _check_own_engine(own: str, stage: int | None) -> None:
    if stage is None:
        raise ArgumentError(
            f"`teacher_deepspeed: {own}` needs a student under DeepSpeed: set `deepspeed` as well, or remove it."
        )

    zero = read_deepspeed_file("teacher_deepspeed", own).get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 3):
        raise ArgumentError(
            f"`teacher_deepspeed: {own}` must have `zero_optimization.stage` 3, or 0 for a complete teacher on each "
            "rank: the others shard optimizer states and gradients, which a teacher does not have."
        )


def _check_shared(model_args: Any, finetuning_args: Any, fsdp: bool) -> None:
    kind = getattr(finetuning_args, "finetuning_type", "lora")
    if kind != "lora":
        raise ArgumentError(
            f"`teacher_model: {SELF}` needs `finetuning_type: lora`, and it is {kind}, which changes the base itself: "
            "name the base model under `teacher_model`."
        )

    if getattr(finetuning_args, "pissa_init", False):
        raise ArgumentError(
            f"`pissa_init: true` takes a part out of the base that `teacher_model: {SELF}` shares: remove one of them."
        )

    if getattr(model_args, "train_from_scratch", False):
        raise ArgumentError(
            f"`train_from_scratch: true` leaves the base that `teacher_model: {SELF}` shares without what it has "
            "learned: name the base model under `teacher_model`."
        )

    adapters = getattr(model_args, "adapter_name_or_path", None) or []
    adapters = adapters.split(",") if isinstance(adapters, str) else adapters
    if len(adapters) > 1 or (adapters and getattr(finetuning_args, "create_new_adapter", False)):
        raise ArgumentError(
            f"`adapter_name_or_path: {','.join(adapters)}` is merged into the base that `teacher_model: {SELF}` "
            "shares: name the base model under `teacher_model`."
        )

    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":  # version 1 gathers weights in its own pass alone
        raise ArgumentError(
            f"`teacher_model: {SELF}` cannot be used with FSDP 1: set `fsdp_version: 2` in its configuration, or name "
            "the base model under `teacher_model`."
        )


def _zero_stage(training_args: Any) -> int | None:
    """Return the student's ZeRO stage, None without DeepSpeed; others refuse a file that cannot be read."""
    source = getattr(training_args, "deepspeed", None)
    if not source:
        launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "") == "true"
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)) if launched else None

    try:
        zero = read_deepspeed_file("deepspeed", source).get("zero_optimization", {})
    except ArgumentError:
        return 0

    return zero.get("stage", 0) if isinstance(zero, dict) else 0


def _uses_fsdp(training_args: Any) -> bool:
    return bool(getattr(training_args, "fsdp", None)) or os.environ.get("ACCELERATE_USE_FSDP", "") == "true"
