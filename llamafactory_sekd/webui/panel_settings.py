"""From the panel's fields to the keys of a training YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from llamafactory_sekd.argument_checks import check_distillation_arguments
from llamafactory_sekd.arguments import AUTO, KEYS, DistillationArguments, keys_read_by
from llamafactory_sekd.errors import ArgumentError


NO_QUANTIZATION = "none"
COMPILE = {AUTO: None, "true": True, "false": False}
_ON_POLICY = ("kd_on_policy", "kd_on_policy_truncated", "kd_on_policy_every")
_MAPPINGS = ("kd_loss", "teacher_model")  # a name, or a mapping on one line


def unused_keys(kd_loss: Any) -> frozenset[str]:
    """Return the keys that have no effect with this objective, a name or a mapping, also as text.

    Where it cannot be read no key counts as unused; the checks then say what is wrong.
    """
    try:
        return frozenset(KEYS) - keys_read_by(DistillationArguments(kd_loss=kd_loss).kd_loss)
    except ArgumentError:
        return frozenset()


def distillation_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the YAML: those that the objective uses and that were filled in.

    Args:
        values: what each field of the panel holds, by key; several teacher adapters are a list.
    """
    unused = unused_keys(values["kd_loss"])
    keys = {key: _plain(key, value) for key, value in values.items() if key not in unused}
    if not keys.get("kd_on_policy"):  # references alone, as without these keys
        keys = {key: value for key, value in keys.items() if key not in _ON_POLICY}
    return {key: value for key, value in keys.items() if value not in (None, "")}


def _plain(key: str, value: Any) -> Any:
    if key == "teacher_model_quantization_bit":
        return None if value == NO_QUANTIZATION else int(value)

    if key == "kd_compile":
        return COMPILE[value]

    if key in _MAPPINGS:
        return _mapping(key, value)

    if isinstance(value, list):
        return ",".join(value)

    if not isinstance(value, str):
        return value

    text = value.strip()
    # Not the field's own `type`: the host's parser resolves that in place, once it has run in this process.
    hint = get_type_hints(DistillationArguments)[key]
    kind = next((kind for kind in (int, float) if kind in (get_args(hint) or (hint,))), str)
    try:
        return kind(text) if text else None
    except ValueError:
        return text  # the checks refuse it, in words that name the key


def _mapping(key: str, value: Any) -> Any:
    value = value.strip() or None if isinstance(value, str) else value
    try:
        return getattr(DistillationArguments(**{key: value}), key)
    except ArgumentError:
        return value  # the checks refuse it, in words that name the key


def check_keys(keys: Mapping[str, Any]) -> None:
    """Check the distillation keys among the keys of a run; :class:`ArgumentError` for the first that cannot work."""
    known = {item.name for item in fields(DistillationArguments)}
    try:
        args = DistillationArguments(**{key: value for key, value in keys.items() if key in known})
    except TypeError as error:
        raise ArgumentError(str(error)) from error

    check_distillation_arguments(args)
