"""What can be said of a teacher before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from llamafactory_sekd.errors import TeacherError


def check_teacher_files(teacher_model: str) -> None:
    """Check a local teacher folder; a hub id passes.

    Raises:
        TeacherError: the path does not exist, or holds an adapter without its base model.
    """
    path = Path(teacher_model).expanduser()
    if not path.is_dir():
        looks_like_path = path.is_absolute() or teacher_model.startswith((".", "~")) or teacher_model.count("/") > 1
        if looks_like_path:
            raise TeacherError(
                f"`teacher_model: {teacher_model}` does not exist: give a folder with a model, or a hub id."
            )
        return

    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise TeacherError(
            f"`teacher_model: {teacher_model}` holds only an adapter: put the base model there and the adapter's path "
            "under `teacher_model_adapters`."
        )

    if not (path / "config.json").is_file():
        raise TeacherError(f"`teacher_model: {teacher_model}` holds no config.json: give the folder of a saved model.")


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
