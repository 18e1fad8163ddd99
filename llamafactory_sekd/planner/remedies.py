"""What makes a run fit that does not, the cheapest first, each with what it is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llamafactory_sekd.arguments import AUTO
from llamafactory_sekd.planner.estimate import Estimate
from llamafactory_sekd.planner.planned_run import Run


@dataclass(frozen=True)
class Remedy:
    """A change to the YAML.

    Attributes:
        keys: the keys to set; None takes a key out.
        text: the change in words, for the table.
        cost: what is paid for it.
    """

    keys: Mapping[str, Any]
    text: str
    cost: str


@dataclass(frozen=True)
class Priced:
    """A remedy and the bytes per device that remain with it alone, and with all before it."""

    remedy: Remedy
    alone: int
    together: int


def remedies_for(config: Mapping[str, Any], run: Run) -> list[Remedy]:
    """Return the remedies that a run has not taken yet, the cheapest first."""
    return [
        remedy
        for make in (
            _checkpointing,
            _micro_batch,
            _zero,
            _offload,
            _cache,
            _teacher_offload,
            _quantized_teacher,
            _lora,
        )
        if (remedy := make(config, run)) is not None
    ]


def price(
    config: Mapping[str, Any],
    run: Run,
    needed: int,
    memory: int,
    plan: Callable[[Mapping[str, Any]], Estimate],
) -> Iterator[Priced]:
    """Estimate the run with each remedy; ends with the first that, alone or with those before it, makes it fit.

    Remedies that save less than a hundredth are left out.

    Args:
        config: the YAML's keys.
        run: the run that does not fit.
        needed: bytes per device that it needs as it is.
        memory: bytes of a device.
        plan: from a YAML's keys to its estimate.
    """
    gathered: dict[str, Any] = {}
    for remedy in remedies_for(config, run):
        if "teacher_cache" in gathered and any(key.startswith("teacher_") for key in remedy.keys):
            continue  # the teacher is gone already

        alone = plan(_changed(config, remedy.keys)).device
        if alone > 0.99 * needed:
            continue

        gathered.update(remedy.keys)
        together = alone if gathered == remedy.keys else plan(_changed(config, gathered)).device
        yield Priced(remedy, alone, together)
        if min(alone, together) <= memory:
            return


def _changed(config: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**config, **keys}.items() if value is not None}


def _checkpointing(config: Mapping[str, Any], run: Run) -> Remedy | None:
    if not config.get("disable_gradient_checkpointing"):
        return None

    keys = {"disable_gradient_checkpointing": None}
    return Remedy(keys, "remove disable_gradient_checkpointing", "a second forward pass of the student")


def _micro_batch(config: Mapping[str, Any], run: Run) -> Remedy | None:
    if run.batch_size == 1:
        return None

    keys = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": run.accumulation * run.batch_size,
    }
    return Remedy(keys, "\n".join(f"{key}: {value}" for key, value in keys.items()), "smaller products, the same loss")


def _zero(config: Mapping[str, Any], run: Run) -> Remedy | None:
    if run.devices == 1 or (run.sharding is not None and run.sharding.stage == 3) or not _takes_zero_3(config, run):
        return None

    return Remedy({"deepspeed": _zero_3(run)}, "deepspeed: a file with ZeRO-3", "communication")


def _offload(config: Mapping[str, Any], run: Run) -> Remedy | None:
    if not run.accelerator or run.distillation is None or not _takes_zero_3(config, run):
        return None

    if run.sharding is not None and run.sharding.offload_optimizer:
        return None

    keys = {"deepspeed": {**_zero_3(run), "zero_optimization": {**_ZERO_3, "offload_optimizer": {"device": "cpu"}}}}
    return Remedy(keys, "deepspeed: a file with ZeRO-3 and offload_optimizer", "the optimizer's step on the CPU")


def _cache(config: Mapping[str, Any], run: Run) -> Remedy | None:
    if run.teacher is None:
        return None

    if run.place.kind == "student":
        return None

    keys = {**{key: None for key in config if key.startswith("teacher_model")}, "teacher_cache": "teacher_cache"}
    keys.update(teacher_offload=None, teacher_deepspeed=None)
    return Remedy(keys, "teacher_cache instead of teacher_model (sekd cache)", "disk, and the teacher once beforehand")


def _teacher_offload(config: Mapping[str, Any], run: Run) -> Remedy | None:
    if run.teacher is None or run.teacher.quantization_bit is not None or not run.accelerator:
        return None

    if run.place.kind != "device" or config.get("teacher_deepspeed") or config.get("teacher_offload"):
        return None

    return Remedy(
        {"teacher_offload": True}, "teacher_offload: true", "the teacher's weights sent in each forward pass"
    )


def _quantized_teacher(config: Mapping[str, Any], run: Run) -> Remedy | None:
    if run.teacher is None or run.teacher.quantization_bit is not None or not run.accelerator:
        return None

    if run.place.kind != "device" or config.get("teacher_deepspeed") or config.get("teacher_offload"):
        return None

    return Remedy({"teacher_model_quantization_bit": 4}, "teacher_model_quantization_bit: 4", "an inexact teacher")


def _lora(config: Mapping[str, Any], run: Run) -> Remedy | None:
    if config.get("finetuning_type", "lora") in ("lora", "oft"):
        return None

    return Remedy({"finetuning_type": "lora"}, "finetuning_type: lora", "another method of training")


_ZERO_3 = {
    "stage": 3,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
}


def _zero_3(run: Run) -> dict[str, Any]:
    return {"zero_optimization": _ZERO_3, "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}


def _takes_zero_3(config: Mapping[str, Any], run: Run) -> bool:
    return run.student.quantization_bit is None and config.get("teacher_model_device", AUTO) == AUTO
