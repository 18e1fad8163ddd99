"""Copies of the host's model arguments."""

from __future__ import annotations

from typing import Any


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
