"""What can be said of a teacher before its weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
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
        if _is_path(model):
            remedy = _near(model) or "give a folder with a model, or a hub id."
            raise error(f"`{key}: {model}` does not exist: {remedy}")
        return

    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise error(
            f"`{key}: {model}` holds only an adapter: put the base model there and the adapter's path "
            f"under `{adapters_key}`."
        )

    if not (path / "config.json").is_file():
        raise error(f"`{key}: {model}` holds no config.json: give the folder of a saved model.")


def check_adapter_files(
    adapters: Iterable[str], key: str = "teacher_model_adapters", error: type[SekdError] = TeacherError
) -> None:
    """Check the local folders among a model's adapters; a hub id passes.

    Raises:
        SekdError: of the class ``error``: one of them holds no adapter.
    """
    for name in adapters:
        path = Path(name).expanduser()
        if path.is_dir() and not (path / "adapter_config.json").is_file():
            raise error(f"`{key}: {name}` holds no adapter_config.json: give the folder of a saved adapter.")

        if not path.is_dir() and _is_path(name):
            remedy = _near(name) or "give the folder of a saved adapter."
            raise error(f"`{key}: {name}` does not exist: {remedy}")


def _is_path(name: str) -> bool:
    """Tell a path that names no folder from a hub id, which has one slash at most."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _near(name: str) -> str:
    """Return the question whether a folder of nearly the same name was meant; empty where there is none."""
    path = Path(name).expanduser()
    if not path.parent.is_dir():
        return ""
    close = get_close_matches(path.name, [item.name for item in path.parent.iterdir() if item.is_dir()], n=1)
    return f"did you mean {str(Path(name).with_name(close[0]))!r}?" if close else ""


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
