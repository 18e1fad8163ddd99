"""Prompts for translation: Parrot's, a plain one for chat templates, and the user's own.

The Parrot prompt of Jiao et al., "ParroT" (2023), is worded here and nowhere else. LLaMA-Factory joins a record's
``instruction`` and ``input`` with one newline and puts the result into a template. So Parrot's heading ``### Input:``
is the end of the instruction, and the template ``parrot`` holds everything around both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring as encode
from pathlib import Path
from typing import Any, TypedDict

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.files import read_json


PREFACE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
# Nothing comes between this heading and the translation.
CLOSING = "\n\n### Response:"

FIELDS = ("source", "source_language", "target_language", "source_code", "target_code")
_FIELD = re.compile(r"\{(\w*)\}")


class AlpacaRecord(TypedDict):
    """One training example in LLaMA-Factory's ``alpaca`` format."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Prompt:
    """The user's turn: ``text`` with the fields of :data:`FIELDS` in braces, and the name that messages use.

    Raises:
        ArgumentError: ``{source}`` is missing or occurs twice, or a field is unknown.
    """

    text: str
    name: str = "a prompt of your own"

    def __post_init__(self) -> None:
        found = _FIELD.findall(self.text)
        unknown = [name for name in found if name not in FIELDS]
        known = ", ".join(f"{{{name}}}" for name in FIELDS)
        if unknown:
            raise ArgumentError(f"Unknown field {{{unknown[0]}}} in the prompt {self.text!r}: use {known}.")
        if found.count("source") != 1:
            raise ArgumentError(f"The prompt {self.text!r} needs {{source}} exactly once; the fields are {known}.")

    def instruction(self, direction: Direction) -> str:
        """Return a record's instruction: what comes before the sentence, without the newline that the host adds.

        Only for a prompt that ends with the sentence on a line of its own; see :attr:`ends_with_source`.
        """
        return self._fill(self.text.removesuffix("\n{source}"), "", direction)

    @property
    def ends_with_source(self) -> bool:
        """Whether a record can keep the sentence in its ``input``."""
        return self.text.endswith("\n{source}") and self.text != "\n{source}"

    def user_message(self, source: str, direction: Direction) -> str:
        """Return the user's turn as LLaMA-Factory builds it from a record; the template goes around it."""
        return self._fill(self.text, source, direction)

    def record(self, source: str, target: str, direction: Direction) -> AlpacaRecord:
        """Return the training example whose response is ``target``."""
        if self.ends_with_source:
            return {"instruction": self.instruction(direction), "input": source, "output": target}
        return {"instruction": self.user_message(source, direction), "input": "", "output": target}

    def lines(self, sources: Sequence[str], targets: Sequence[str], direction: Direction) -> list[str]:
        """Return the lines of a JSON Lines file: :meth:`record` of each pair, only faster.

        The pairs are clean: no sentence has a line break or a control character other than the tab and U+001F.
        """
        if not self.ends_with_source or not sources:
            pairs = zip(sources, targets, strict=True)
            return [json.dumps(self.record(*pair, direction), ensure_ascii=False) for pair in pairs]
        start, between = f'{{"instruction": {encode(self.instruction(direction))}, "input": "', '", "output": "'
        sides = zip(_escaped(sources), _escaped(targets), strict=True)
        return [f'{start}{source}{between}{target}"}}' for source, target in sides]

    def _fill(self, text: str, source: str, direction: Direction) -> str:
        values = {
            "source": source,
            "source_language": direction.source_language,
            "target_language": direction.target_language,
            "source_code": direction.source,
            "target_code": direction.target,
        }
        # In one pass, so that braces in the sentence stay what they are.
        return _FIELD.sub(lambda match: values[match[1]], text)


def _escaped(texts: Sequence[str]) -> Sequence[str]:
    """Return clean texts as JSON strings without their quotation marks: all at once, for most need no change."""
    escaped = joined = "\n".join(texts)
    for character in ("\\", '"', "\t", "\x1f"):
        escaped = escaped.replace(character, encode(character)[1:-1])
    return texts if escaped == joined else escaped.split("\n")


_ORDER = "Translate the following sentences from {source_language} to {target_language}."
PARROT = Prompt(f"{_ORDER}\n\n### Input:\n{{source}}", "parrot")
PLAIN = Prompt(f"{_ORDER}\n\n{{source}}", "plain")


def prompt_named(text: str | None) -> Prompt:
    r"""Return the prompt of an option or a YAML key: ``parrot`` (also for nothing), ``plain``, or a text with fields.

    In a text, the two characters ``\n`` are a line break, since a shell has no easy way to write one.

    Raises:
        ArgumentError: the text has no ``{source}`` or an unknown field.
    """
    for known in (PARROT, PLAIN):
        if text == known.name:
            return known
    return PARROT if text is None else Prompt(text.replace("\\n", "\n"))


def instruction(direction: Direction) -> str:
    """Return what comes before the source sentence in Parrot's prompt: the order to translate and the heading."""
    return PARROT.instruction(direction)


def record(source: str, target: str, direction: Direction) -> AlpacaRecord:
    """Return Parrot's training example whose response is ``target``."""
    return PARROT.record(source, target, direction)


def prompt(source: str, direction: Direction) -> str:
    """Return Parrot's complete prompt, up to and including ``### Response:``."""
    return f"{PREFACE}{PARROT.user_message(source, direction)}{CLOSING}"


def prompt_in_manifest(data: Path) -> str | None:
    """Return the name of the prompt in the manifest next to ``data``; None when no manifest is ours."""
    for path in (data.with_name(f"{data.stem}.manifest.json"), data.with_name("manifest.json")):
        manifest: Any = read_json(path)
        if isinstance(manifest, dict) and data.name in manifest.get("files", {}):
            request = manifest.get("request")
            return str(request.get("prompt", PARROT.name)) if isinstance(request, dict) else None
    return None
