"""What can be said of a teacher before its weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from llamafactory_sekd.errors import SekdError, TeacherError


def check_teacher_files(teacher_model: str) -> None:
    """Check a local teacher folder; see :func:`check_model_files`."""
    check_model_files(teacher_model, "teacher_model", "teacher_model_adapters")


def check_model_files(model: str, key: str, adapters_key: str, error: type[SekdError] = TeacherError) -> None:
    """Check a local folder; a hub id passes.

    Args:
        model: the folder or hub id.
        key: the YAML's key that names it.
        adapters_key: the YAML's key for adapters.
        error: the class of the error.

    Raises:
        SekdError: of the class ``error``: the path does not exist, or holds an adapter without its base model.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        looks_like_path = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
        if looks_like_path:
            raise error(f"`{key}: {model}` does not exist: give a folder with a model, or a hub id.")
        return

    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise error(
            f"`{key}: {model}` holds only an adapter: put the base model there and the adapter's path "
            f"under `{adapters_key}`."
        )

    if not (path / "config.json").is_file():
        raise error(f"`{key}: {model}` holds no config.json: give the folder of a saved model.")


def check_adapter_files(adapters: str) -> None:
    """Check the local folders among a teacher's adapters, separated by commas; a hub id passes.

    Raises:
        TeacherError: one of them holds no adapter.
    """
    for name in adapters.split(","):
        path = Path(name).expanduser()
        if path.is_dir() and not (path / "adapter_config.json").is_file():
            raise TeacherError(
                f"`teacher_model_adapters: {name}` holds no adapter_config.json: give the folder of a saved adapter."
            )

        if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
            raise TeacherError(f"`teacher_model_adapters: {name}` does not exist: give the folder of a saved adapter.")


def check_is_causal(teacher_model: str, config: Any) -> None:
    """Check that a configuration belongs to a causal language model.

    Args:
        teacher_model: the teacher's name, for the message.
        config: its transformers configuration.

    Raises:
        TeacherError: it belongs to something else.
    """
    causal = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    known_classes = {name for names in causal.values() for name in ([names] if isinstance(names, str) else names)}
    architectures = list(getattr(config, "architectures", None) or [])
    own_code = bool(getattr(config, "auto_map", None))
    is_causal = own_code or (
        config.model_type in causal
        and not getattr(config, "is_encoder_decoder", False)
        and (not architectures or any(name in known_classes for name in architectures))
    )
    if not is_causal:
        kind = ", ".join(architectures) or config.model_type
        raise TeacherError(
            f"`teacher_model: {teacher_model}` is a {kind}, not a causal language model: choose a decoder-only model "
            "with the student's tokenizer."
        )


def positions_line(teacher_model: str, config: Any, cutoff_len: int) -> str:
    """Return what a teacher's positions mean for examples of up to ``cutoff_len`` tokens; empty where nothing.

    Args:
        teacher_model: the teacher's name.
        config: its transformers configuration.
        cutoff_len: the run's.
    """
    text = config.get_text_config()
    found = getattr(text, "rope_scaling", None) or getattr(text, "rope_parameters", None)
    scaling = found if isinstance(found, Mapping) else {}
    kind = scaling.get("rope_type", scaling.get("type"))
    limit = getattr(text, "max_position_embeddings", None)
    if kind == "longrope":
        limit = getattr(text, "original_max_position_embeddings", None) or limit
    if not limit or cutoff_len <= limit:
        return ""
    if kind in ("dynamic", "longrope"):
        return (
            f"Beyond {int(limit):,} tokens the positions of `teacher_model: {teacher_model}` depend on the longest "
            f"example of a batch (`rope_type: {kind}`): its answers to the same example differ from batch to batch, "
            f"and a cache keeps those of its own batches. With `cutoff_len: {int(limit)}` they are always the same."
        )
    return (
        f"`cutoff_len: {cutoff_len}` goes beyond the {int(limit):,} positions of `teacher_model: {teacher_model}`: "
        "what it answers there is a guess. Use a smaller `cutoff_len`, or a teacher with a longer context."
    )
