"""Refuses values and combinations of the stage's keys that cannot work, each by name and in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import fields, replace
from typing import Any, TypeGuard

from llamafactory_sekd.arguments import (
    AUTO,
    GAMMA,
    HARD_SCALES,
    SELF,
    STAGE,
    DistillationArguments,
    cache_folders,
    keys_read_by,
)
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.formula import MEAN, TEMPERATURES, Formula, Side
from llamafactory_sekd.presets import PRESETS, preset_of


_PLACING = ("teacher_model_device", "teacher_offload", "teacher_deepspeed")


def refuse_keys(arguments: Any, reasons: Mapping[str, str], message: str) -> None:
    """Refuse the first of some keys that is set.

    Args:
        arguments: what has the keys as attributes; those that it lacks count as not set.
        reasons: from the key to why it is refused.
        message: with ``{key}``, ``{value}`` and ``{reason}``.

    Raises:
        ArgumentError: one of them is set.
    """
    for key, reason in reasons.items():
        value = getattr(arguments, key, None)
        if value:
            raise ArgumentError(message.format(key=key, value=value, reason=reason))


def check_distillation_arguments(args: DistillationArguments) -> None:
    """Check the keys of a run with ``stage: sekd``.

    Raises:
        ArgumentError: a key is missing, out of range, or set where it has no effect.
    """
    if not args.teacher_model:
        if not args.teacher_cache and not args.teacher_server:
            raise ArgumentError(
                "`teacher_model` is missing: name the teacher's path or hub id, a `teacher_cache`, or a "
                "`teacher_server`, as `stage: sekd` needs one."
            )

        for key in ("teacher_model_adapters", "teacher_model_quantization_bit", *_PLACING):
            if _is_set(args, key):
                _refuse(args, key, "it belongs to `teacher_model`, which is missing; leave both out or set both")

    if isinstance(args.teacher_model, dict):
        _check_teacher_of_each(args, args.teacher_model)

    for key in ("teacher_model_adapters", "teacher_cache", "teacher_server", "teacher_deepspeed"):
        if not isinstance(getattr(args, key), (str, type(None))):
            _refuse(args, key, "use one path" if key == "teacher_deepspeed" else "use one path or hub id")

    if not isinstance(args.teacher_model, (dict, str, type(None))):
        _refuse(args, "teacher_model", "use one path or hub id, or a mapping from data set to model")

    if args.teacher_model_quantization_bit not in (None, 4, 8):
        _refuse(args, "teacher_model_quantization_bit", "use 4 or 8, or leave it out")

    _check_caches(args)
    _check_server(args)
    _check_placement(args)
    preset_of(args.kd_loss)
    _check_range(args, "teacher_max_nonfinite", 0, 1)
    _check_range(args, "kd_lambda", 0, 1)
    _check_range(args, "kd_beta", 0, 1)
    if args.kd_beta_end is not None:
        _check_range(args, "kd_beta_end", 0, 1)
        _check_read(args, "kd_beta_end", "has no β")

    reads_beta = "kd_beta" in keys_read_by(args.kd_loss)
    if reads_beta and args.kd_beta == 0 and args.kd_beta_end in (None, 0):
        _refuse(
            args, "kd_beta", "β is the student's share of the proxy, and without it no loss depends on the student"
        )

    if args.kd_gamma == AUTO:
        _check_read(args, "kd_gamma", "has no Γ")
    elif not _is_number(args.kd_gamma) or math.isnan(args.kd_gamma):
        _refuse(args, "kd_gamma", f"use a number, for example {GAMMA}, or {AUTO}")

    if args.kd_hard_scale not in HARD_SCALES:
        _refuse(args, "kd_hard_scale", f"choose one of {', '.join(HARD_SCALES)}")

    if args.kd_hard_scale != "none":
        _check_read(args, "kd_hard_scale", "does not tell hard tokens from easy ones")

    _check_topk(args)
    _check_temperature(args)
    formula = args.formula()
    _check_range(args, "kd_on_policy", 0, 1)
    if args.kd_on_policy_truncated not in ("keep", "drop"):
        _refuse(args, "kd_on_policy_truncated", "choose keep or drop")

    if not _is_count(args.kd_on_policy_every):
        _refuse(args, "kd_on_policy_every", "use an integer of at least 1")

    for key in ("kd_on_policy_truncated", "kd_on_policy_every"):
        if not args.kd_on_policy and _is_set(args, key):
            _refuse(args, key, "it is about own samples, and `kd_on_policy` is 0; leave it out, or set both")

    if args.kd_on_policy and args.teacher_cache:
        _refuse(
            args, "kd_on_policy", "own samples are new text, which no `teacher_cache` holds; set `teacher_model` alone"
        )

    _check_range(args, "kd_max_cut", 0, 1)
    size = args.kd_chunk_size
    if size is not None and not _is_count(size):
        _refuse(args, "kd_chunk_size", "use an integer of at least 1, or leave it out")

    if not isinstance(args.kd_compile, (bool, type(None))):
        _refuse(args, "kd_compile", "use true or false, or leave it out")

    if args.kd_compile and formula.moves:
        what = "a β that moves (`kd_beta_end`)" if args.kd_beta_end is not None else "a number of `kd_loss` that moves"
        _refuse(args, "kd_compile", f"{what} would recompile in every step; remove one of them")


def check_no_distillation_arguments(args: DistillationArguments, stage: str, given: Iterable[str] = ()) -> None:
    """Check that a run of another stage sets none of our keys.

    Args:
        args: the parsed arguments.
        stage: the stage of the run.
        given: the names that the user set, where known; without it a key that was set to its default passes.

    Raises:
        ArgumentError: a key of ours is set.
    """
    named = set(given)
    for item in fields(DistillationArguments):
        value = getattr(args, item.name)
        if value != item.default or item.name in named:
            raise ArgumentError(
                f"`{item.name}: {value}` belongs to the distillation stage and has no effect with `stage: {stage}`: "
                f"remove it, or set `stage: {STAGE}`."
            )


def idle_keys(args: DistillationArguments) -> list[str]:
    """Return a line for each number that a run gives without changing its objective, and for what else is idle in it.

    They are told and not refused: a YAML keeps them while `kd_loss` is changed on the command line.

    Args:
        args: checked keys.
    """
    formula, lines = args.formula(), []
    for key in ("kd_lambda", "kd_beta", "kd_beta_end", "kd_gamma", "kd_topk", "kd_temperature"):
        if not _is_set(args, key):
            continue
        without = copy(args)
        setattr(without, key, DistillationArguments.__dataclass_fields__[key].default)
        try:
            changes = _simplest(without.formula()) != _simplest(formula)
        except ArgumentError:  # it cannot be left out
            changes = True
        if not changes:
            lines.append(
                f"`{key}: {getattr(args, key)}` has no effect on the objective of this run, "
                f"`kd_loss: {_named(args)}`: remove it, or choose an objective that reads it."
            )

    if formula.gate is not None and _simplest(formula).gate is None:
        alike = formula.easy == formula.hard
        why = "hard tokens have the loss of the easy ones" if alike else "its gate selects every token"
        lines.append(f"`kd_loss: {_named(args)}` has one loss for all tokens with these keys: {why}.")
    if all(side.kd_lambda == 0.0 for side in formula.sides) and not args.kd_on_policy:
        lines.append("λ is 0 (`kd_lambda`): the target is the reference alone, and the teacher has no share in it.")
    return lines


def _simplest(formula: Formula) -> Formula:
    """Return a formula without what no token is affected by, for comparing what two of them mean."""
    gate, hard = formula.gate, formula.hard
    if gate is None or hard is None:
        return replace(formula, easy=_simplest_side(formula.easy, formula.target))
    if gate.share == 1.0 or (formula.easy == hard and gate.cooling == 0.0):
        return replace(formula, gate=None, easy=_simplest_side(hard, formula.target), hard=None)
    # What a gate looks at is taken with λ and T of the easy side, whatever that side's loss is.
    return replace(formula, hard=_simplest_side(hard, formula.target))


def _simplest_side(side: Side, target: str) -> Side:
    """Return a side with one value for each of the numbers that its loss does not read."""
    is_reference_alone = target == "teacher" and side.kd_lambda == 0.0
    if side.weight != 0.0 and not is_reference_alone:
        return side
    return Side((("kl", 1.0),), (), kd_lambda=0.0, skew=1.0, weight=side.weight, temperature=1.0, interpolation=1.0)


def mixing_weights(args: DistillationArguments) -> list[float] | None:
    """Return the weight of each folder of ``teacher_cache``, None without ``teacher_mix``.

    Raises:
        ArgumentError: it is neither ``mean`` nor one positive number for each folder.
    """
    if args.teacher_mix is None:
        return None

    folders = cache_folders(args.teacher_cache)
    if args.teacher_mix == MEAN:
        return [1.0] * len(folders)

    try:
        weights = [float(text) for text in str(args.teacher_mix).split(",")]
    except ValueError:
        weights = []

    if len(weights) != len(folders) or not all(0 < weight < math.inf for weight in weights):
        _refuse(args, "teacher_mix", f"use {MEAN}, or {len(folders)} weights above 0, one for each `teacher_cache`")

    return weights


def _check_teacher_of_each(args: DistillationArguments, teachers: dict[str, Any]) -> None:
    for name, model in teachers.items():
        if not isinstance(model, str) or not model.strip():
            raise ArgumentError(f"`teacher_model.{name}: {model}` cannot be used: use one path or hub id.")

        if model == SELF:
            raise ArgumentError(
                f"`teacher_model.{name}: {SELF}` cannot be used: name the base model's path or hub id, since several "
                "teachers are loaded next to the student."
            )

    reasons = {
        "teacher_model_adapters": "they belong to one model; merge them into the model of each data set",
        "teacher_cache": "several teachers fill no cache while training; use `sekd cache` first, or remove it",
    }
    for key, reason in reasons.items():
        if _is_set(args, key):
            _refuse(args, key, f"`teacher_model` names one for each data set, and {reason}")


def _check_caches(args: DistillationArguments) -> None:
    folders = cache_folders(args.teacher_cache)
    if args.teacher_model and len(folders) > 1:
        _refuse(args, "teacher_cache", "`teacher_model` fills one folder; name that one, or remove `teacher_model`")

    if args.teacher_mix is not None and len(folders) < 2:
        _refuse(args, "teacher_mix", "it needs several folders in `teacher_cache`, separated by commas")

    mixing_weights(args)


def _check_server(args: DistillationArguments) -> None:
    for key in ("teacher_model", "teacher_cache"):
        if args.teacher_server and _is_set(args, key):
            _refuse(args, key, "`teacher_server` is the teacher; remove one of the two")

    for key in ("teacher_server_topk", "teacher_server_patience"):
        if not args.teacher_server and _is_set(args, key):
            _refuse(args, key, "it belongs to `teacher_server`, which is missing; leave both out or set both")

    k = args.teacher_server_topk
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or not 8 <= k <= 512):
        _refuse(args, "teacher_server_topk", "use an integer from 8 to 512, or leave it out")

    _check_range(args, "teacher_server_patience", 1, 7 * 86400)


def _check_placement(args: DistillationArguments) -> None:
    device = args.teacher_model_device
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda:\d{1,4}", device):
        _refuse(args, "teacher_model_device", "use auto, cpu, or cuda:N with the number of a device")

    if not isinstance(args.teacher_offload, bool):
        _refuse(args, "teacher_offload", "use true or false")

    placing = [key for key in _PLACING if _is_set(args, key)]
    if args.teacher_model == SELF and args.teacher_model_quantization_bit is not None:
        _refuse(
            args,
            "teacher_model_quantization_bit",
            f"`teacher_model: {SELF}` is the student's base; set `quantization_bit` for both",
        )

    if args.teacher_model == SELF and placing:
        _refuse(args, placing[0], f"`teacher_model: {SELF}` is the student's base and shares its device; remove it")

    if args.teacher_model_quantization_bit is not None and placing:
        _refuse(args, placing[0], "bitsandbytes places a quantized teacher on the student's device; remove it")

    if args.teacher_offload and device == "cpu":
        _refuse(args, "teacher_offload", "`teacher_model_device: cpu` keeps the weights there anyway; remove one")

    if args.teacher_deepspeed is not None and device != AUTO:
        _refuse(args, "teacher_deepspeed", f"`teacher_model_device: {device}` is a device of its own; remove one")


def _check_temperature(args: DistillationArguments) -> None:
    low, high = TEMPERATURES
    if not _is_number(args.kd_temperature) or not low <= args.kd_temperature <= high:
        _refuse(args, "kd_temperature", f"use a number above 0, from {low} to {high:g}; the paper uses 1.0")


def _check_topk(args: DistillationArguments) -> None:
    wants_topk = "kd_topk" in keys_read_by(args.kd_loss)
    if wants_topk and args.kd_topk is None:
        raise ArgumentError(
            "`kd_topk` is missing: `kd_loss: self_evolution_topk` needs the share of hard tokens, e.g. 0.5."
        )

    if args.kd_topk is None:
        return

    if not wants_topk:
        _refuse(args, "kd_topk", f"`kd_loss: {_named(args)}` does not use it; leave it out or use self_evolution_topk")

    if not _is_number(args.kd_topk) or not 0 < args.kd_topk <= 1:
        _refuse(args, "kd_topk", "use a share above 0 and up to 1, for example 0.5 for half of the tokens")


def _check_read(args: DistillationArguments, key: str, lack: str) -> None:
    """Refuse a key that the objective does not read."""
    if key not in keys_read_by(args.kd_loss):
        others = ", ".join(name for name in PRESETS if key in keys_read_by(name))
        _refuse(args, key, f"`kd_loss: {_named(args)}` {lack}; leave it out or use one of {others}")


def _named(args: DistillationArguments) -> str:
    """Return the preset, or a word for a mapping of the user's own."""
    return preset_of(args.kd_loss) or "{…}"


def _check_range(args: DistillationArguments, key: str, low: float, high: float) -> None:
    value = getattr(args, key)
    if not _is_number(value) or not low <= value <= high:
        _refuse(args, key, f"use a number from {low} to {high}")


def _is_set(args: DistillationArguments, key: str) -> bool:
    return getattr(args, key) != DistillationArguments.__dataclass_fields__[key].default


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _refuse(args: DistillationArguments, key: str, remedy: str) -> None:
    value = " ".join(str(getattr(args, key)).split())  # the message stays on one line
    raise ArgumentError(f"`{key}: {value}` cannot be used: {remedy}.")
