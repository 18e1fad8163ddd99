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


def remedies_for(config: Mapping[str, Any], run: Run) -> list[Remedy]:
    """Return the remedies that a run has not taken yet, the cheapest first."""
    return [*_of_training(config, run), *_of_teacher(config, run), *_of_method(config)]


def _of_training(config: Mapping[str, Any], run: Run) -> Iterator[Remedy]:
    if config.get("disable_gradient_checkpointing"):
        keys: dict[str, Any] = {"disable_gradient_checkpointing": None}
        yield Remedy(keys, "remove disable_gradient_checkpointing", "a second forward pass of the student")

    if run.batch_size != 1:
        keys = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": run.accumulation * run.batch_size}
        text = "\n".join(f"{key}: {value}" for key, value in keys.items())
        yield Remedy(keys, text, "smaller products, the same loss")

    if run.student.quantization_bit is not None or config.get("teacher_model_device", AUTO) != AUTO:
        return  # no ZeRO-3: it takes neither a quantized student nor a teacher on a device of its own

    if run.devices > 1 and (run.sharding is None or run.sharding.stage != 3):
        yield Remedy({"deepspeed": _zero_3()}, "deepspeed: a file with ZeRO-3", "communication")

    offloads = run.sharding is not None and run.sharding.offload_optimizer
    if run.accelerator and run.distillation is not None and not offloads:
        keys = {"deepspeed": _zero_3(offload_optimizer={"device": "cpu"})}
        yield Remedy(keys, "deepspeed: a file with ZeRO-3 and offload_optimizer", "the optimizer's step on the CPU")


def _of_teacher(config: Mapping[str, Any], run: Run) -> Iterator[Remedy]:
    if run.teacher is None:
        return

    if run.place.kind != "student":
        keys = {**{key: None for key in config if key.startswith("teacher_model")}, "teacher_cache": "teacher_cache"}
        keys.update(teacher_offload=None, teacher_deepspeed=None)
        text = "teacher_cache instead of teacher_model (sekd cache)"
        yield Remedy(keys, text, "disk, and the teacher once beforehand")

    is_as_loaded = run.accelerator and run.place.kind == "device" and run.teacher.quantization_bit is None
    if is_as_loaded and not config.get("teacher_deepspeed") and not config.get("teacher_offload"):
        cost = "the teacher's weights sent in each forward pass"
        yield Remedy({"teacher_offload": True}, "teacher_offload: true", cost)
        yield Remedy({"teacher_model_quantization_bit": 4}, "teacher_model_quantization_bit: 4", "an inexact teacher")


def _of_method(config: Mapping[str, Any]) -> Iterator[Remedy]:
    if config.get("finetuning_type", "lora") not in ("lora", "oft"):
        yield Remedy({"finetuning_type": "lora"}, "finetuning_type: lora", "another method of training")


def _zero_3(**options: Any) -> dict[str, Any]:
    sizes = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    return {"zero_optimization": {**sizes, **options}, "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
