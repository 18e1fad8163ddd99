"""The host's templates: ours (`parrot`), whether one exists, and what they make of requests and answers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llamafactory_sekd.data.prompts import CLOSING, PREFACE
from llamafactory_sekd.errors import ArgumentError, HostError, SekdError, suggestion


if TYPE_CHECKING:
    from llamafactory_sekd.evaluation.systems import Request


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


def check_template(key: str, name: str | None, error: type[SekdError] = ArgumentError) -> None:
    """Check that the host has a template; none is the host's to choose.

    Raises:
        SekdError: of the class ``error``: it has no template of this name.
    """
    from llamafactory.data.template import TEMPLATES

    if name is not None and name not in TEMPLATES:
        raise error(f"`{key}`: LLaMA-Factory has no template {name!r}{suggestion(str(name), TEMPLATES)}")


@contextmanager
def templates_restored() -> Iterator[None]:
    """Put back at the end what the host writes into its table of templates for `default_system`."""
    from llamafactory.data.template import TEMPLATES

    before = {name: template.default_system for name, template in TEMPLATES.items()}
    try:
        yield
    finally:
        for name, system in before.items():
            TEMPLATES[name].default_system = system


def template_of(tokenizer: Any, data_args: Any) -> Any:
    """Return the template of a system, whose system prompt and way of thinking stay its own.

    The host writes both into the registry's template, where the next system would find them.
    """
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.data.template import TEMPLATES

    registered = TEMPLATES[data_args.template]
    TEMPLATES[data_args.template] = copy.deepcopy(registered)
    try:
        return get_template_and_fix_tokenizer(tokenizer, data_args)
    finally:
        TEMPLATES[data_args.template] = registered


def encoder(tokenizer: Any, template: Any) -> Any:
    """Return the function that turns a request into prompt ids, exactly as the host's chat engine does."""

    def encode(request: Request) -> list[int]:
        turns = []
        for message, answer in (*request.examples, (request.message, "")):
            turns += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        prompt_ids, _ = template.encode_oneturn(tokenizer, turns)
        return prompt_ids

    return encode


def thought_tokens(tokenizer: Any, template: Any) -> frozenset[int]:
    """Return the special tokens that a text must keep, because thoughts are told by them.

    gpt-oss's channels are such tokens: without them, a thought and the answer are one text.
    """
    from llamafactory_sekd.evaluation.translation_store import THOUGHT_WORDS

    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    words = [word.strip() for pair in (template.thought_words, *THOUGHT_WORDS) for word in pair]
    used = {number for word in words for number in tokenizer.encode(word, add_special_tokens=False)}
    return frozenset(special & used)


def decoder(tokenizer: Any, template: Any) -> Callable[[list[list[int]]], list[str]]:
    """Return the function that turns tokens into text, without special tokens other than those of thoughts."""
    kept = thought_tokens(tokenizer, template)
    if not kept:
        return lambda rows: tokenizer.batch_decode(rows, skip_special_tokens=True)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - kept
    return lambda rows: tokenizer.batch_decode([[number for number in row if number not in special] for row in rows])


def text_arguments(tokenizer: Any, template: Any) -> dict[str, Any]:
    """Return what every decoder is told of a model's text: its ids to text, what ends a response, what pads."""
    return {
        "decode": decoder(tokenizer, template),
        "stop_ids": template.get_stop_token_ids(tokenizer),
        "pad_id": tokenizer.pad_token_id,
    }
