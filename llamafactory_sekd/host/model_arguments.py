"""The host's model arguments: copies of them, and the teacher's, made from the student's."""

from __future__ import annotations

from typing import Any

import torch

from llamafactory_sekd.arguments import AUTO, SELF, DistillationArguments


def teacher_identity(model_args: Any, finetuning_args: DistillationArguments) -> tuple[str, str | None, int | None]:
    """Return what decides the teacher's answers: its model, its adapters, its bits; `self` is the student's base."""
    adapters = finetuning_args.teacher_model_adapters
    if finetuning_args.teacher_model == SELF:
        return model_args.model_name_or_path, adapters, model_args.quantization_bit

    return str(finetuning_args.teacher_model), adapters, finetuning_args.teacher_model_quantization_bit


def teacher_model_arguments(model_args: Any, finetuning_args: DistillationArguments) -> Any:
    """Return the host's model arguments for a teacher that is loaded: the student's with our keys."""
    model, adapters, quantization_bit = teacher_identity(model_args, finetuning_args)
    copy = copy_model_arguments(
        model_args,
        model_name_or_path=model,
        adapter_name_or_path=adapters,
        quantization_bit=quantization_bit,
        train_from_scratch=False,
    )
    device = own_device(finetuning_args)
    if finetuning_args.teacher_offload or device is not None:  # or it would pass through the student's device
        copy.device_map = {"": torch.device("cpu") if finetuning_args.teacher_offload else device}

    return copy


def own_device(finetuning_args: DistillationArguments) -> torch.device | None:
    """Return the teacher's own device, None where it shares the student's."""
    name = finetuning_args.teacher_model_device
    return None if name == AUTO else torch.device(name)


def copy_model_arguments(source: Any, **changes: Any) -> Any:
    """Copy model arguments with changes.

    The host's `copyfrom` does this, but splits what its first construction has split already: lists become the
    comma-separated texts that it expects.
    """
    from llamafactory.hparams import ModelArguments

    split = ("add_tokens", "add_special_tokens", "adapter_name_or_path")
    values = {key: getattr(source, key) for key in split}
    texts = {key: ",".join(value) for key, value in values.items() if isinstance(value, list)}
    return ModelArguments.copyfrom(source, **{**texts, **changes})
