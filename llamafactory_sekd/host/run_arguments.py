"""The arguments of one run, and what they name: data sets, the checkpoint to go on from, the place of the teacher."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llamafactory_sekd.arguments import AUTO, SELF, DistillationArguments
from llamafactory_sekd.checkpoints import defect_of, find_checkpoints, has_optimizer
from llamafactory_sekd.data.alma import DEFAULT_OUT, command_for
from llamafactory_sekd.errors import ArgumentError, DataError, one_line


@dataclass(frozen=True)
class HostArguments:
    """What the host's parser makes of a run's keys.

    ``finetuning`` has our keys, as :class:`llamafactory_sekd.arguments.DistillationArguments`.
    """

    model: Any
    data: Any
    training: Any
    finetuning: Any
    generating: Any

    @property
    def is_first_rank(self) -> bool:
        """Tell whether this process is the one that writes and speaks."""
        return bool(self.training.process_index == 0)


def explain_undefined(get_dataset_list: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's look-up in ``dataset_info.json``: our names get a :class:`DataError`, others what they got."""

    @wraps(get_dataset_list)
    def look_up(dataset_names: list[str] | None, dataset_dir: Any) -> Any:
        try:
            return get_dataset_list(dataset_names, dataset_dir)
        except ValueError as error:
            ours = [name for name in dataset_names or [] if command_for(name)]
            unreadable = str(error).startswith("Cannot open")
            for name in ours:
                if unreadable or f"Undefined dataset {name} in" in str(error):
                    raise DataError(
                        f"Data set {name!r} is not declared in `dataset_dir: {dataset_dir}`: "
                        f"run `{command_for(name)}` and set `dataset_dir: {DEFAULT_OUT}`."
                    ) from error
            raise

    return look_up


def explain_missing_file(load_single_dataset: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's loader of one data set: for a missing file of ours it raises a :class:`DataError`."""

    @wraps(load_single_dataset)
    def load(dataset_attr: Any, model_args: Any, data_args: Any, training_args: Any) -> Any:
        if dataset_attr.load_from == "file":
            path = Path(data_args.dataset_dir, dataset_attr.dataset_name)
            command = command_for(path.stem, path.parent)
            if command is not None and path.suffix == ".json" and not path.exists():
                raise DataError(
                    f"The file {path} of data set {path.stem!r} does not exist yet: run `{command}` to create it."
                )
        return load_single_dataset(dataset_attr, model_args, data_args, training_args)

    return load


def choose_checkpoint(training_args: Any) -> None:
    """Choose the checkpoint to resume from, by one rule for ``true``, a path, and a run that is started again.

    Only complete checkpoints count (see ``checkpoints``). The chosen one is written to ``resume_from_checkpoint``, so
    that everything after this, the check of the teacher included, sees the same one.

    Raises:
        ArgumentError: the user asks to resume and there is nothing complete to resume from.
    """
    asked = training_args.resume_from_checkpoint
    if isinstance(asked, str) and asked.lower() in ("true", "false") and not Path(asked).exists():
        asked = asked.lower() == "true"  # the command line knows text alone
    if asked is False:
        asked = training_args.resume_from_checkpoint = None
    overwrites = getattr(training_args, "overwrite_output_dir", False)
    if not training_args.do_train or not training_args.output_dir or (asked is None and overwrites):
        return

    save_only_model = bool(getattr(training_args, "save_only_model", False))
    if isinstance(asked, str):
        chosen = _named(Path(asked), save_only_model)
    else:
        chosen = _last(training_args, save_only_model, is_asked=asked is True)
    if chosen is None:
        return

    training_args.resume_from_checkpoint = str(chosen)
    if not has_optimizer(chosen):
        _tell(
            training_args,
            f"{chosen} has no optimizer state (`save_only_model: true`): the training continues with its weights, and "
            "an optimizer and a learning rate schedule that start again",
        )


def _named(checkpoint: Path, save_only_model: bool) -> Path | None:
    if not checkpoint.is_dir():
        raise ArgumentError(f"`resume_from_checkpoint: {checkpoint}` is not a folder: name a checkpoint, or true.")
    # A checkpoint that is named may be one of weights alone, whatever this run saves: that is told, not refused.
    defect = defect_of(checkpoint, save_only_model or not has_optimizer(checkpoint))
    if defect is not None:
        complete, _ = find_checkpoints(checkpoint.parent, save_only_model)
        remedy = f"use {complete}" if complete else "remove the key to start from the beginning"
        raise ArgumentError(f"`resume_from_checkpoint: {checkpoint}` is incomplete ({defect}): {remedy}.")
    return checkpoint


def _last(training_args: Any, save_only_model: bool, is_asked: bool) -> Path | None:
    complete, incomplete = find_checkpoints(training_args.output_dir, save_only_model)
    if is_asked and complete is None:
        raise ArgumentError(
            f"`resume_from_checkpoint: true`: {training_args.output_dir} holds no complete checkpoint: remove the key "
            "to start from the beginning."
        )
    if incomplete:
        names, defects = ", ".join(path.name for path in incomplete), ", ".join(dict.fromkeys(incomplete.values()))
        if complete is None:
            training_args.overwrite_output_dir = True  # or the host would take the incomplete one
            remedy = "there is no complete one: the training starts from its beginning"
        else:
            remedy = f"the training resumes from {complete.name}"
        _tell(
            training_args,
            f"{names} in {training_args.output_dir} was interrupted while it was written ({defects}); {remedy}",
        )
    return complete


def _tell(training_args: Any, text: str) -> None:
    if training_args.process_index == 0:
        print(f"llamafactory_sekd: {text}.")


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
