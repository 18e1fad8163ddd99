"""The template ``parrot`` for the host's registry, which command line, chat, export and web UI read."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from llamafactory_sekd.data.prompts import CLOSING, PREFACE
from llamafactory_sekd.errors import HostError


NAME = "parrot"


def with_parrot(templates: dict[str, Any]) -> dict[str, Any]:
    """Return the host's ``TEMPLATES`` with ours added; the given registry stays as it is."""
    register_parrot(sys.modules["llamafactory.data.template"])
    parrot = templates.pop(NAME)
    return {**templates, NAME: parrot}


def register_parrot(module: ModuleType) -> None:
    """Register the template with ``llamafactory.data.template``; :class:`HostError` if the name is taken.

    BOS comes first where the tokenizer has one; there is no system message; a response is its text and EOS.
    """
    if NAME in module.TEMPLATES:
        raise HostError(f"LLaMA-Factory has a template named {NAME!r} already: update llamafactory_sekd.")

    class VerbatimFormatter(module.StringFormatter):  # type: ignore[name-defined]
        """The host also puts the turn's number where it finds ``{{idx}}``, be it in the user's own text."""

        def apply(self, **kwargs: Any) -> Any:
            kwargs.pop("idx", None)
            return super().apply(**kwargs)

    module.register_template(
        name=NAME,
        # One slot, because each slot is tokenized by itself.
        format_user=VerbatimFormatter(slots=[PREFACE + "{{content}}" + CLOSING]),
        format_assistant=module.StringFormatter(slots=["{{content}}", {"eos_token"}]),
        format_prefix=module.EmptyFormatter(slots=[{"bos_token"}]),
        # An exported model is prompted as it was trained, whatever chat template its base came with.
        replace_jinja_template=True,
    )
