"""The Parrot prompt of Jiao et al., "ParroT" (2023): the one place that words it.

LLaMA-Factory joins a record's ``instruction`` and ``input`` with one newline and puts the result into a template.
So the heading ``### Input:`` stands at the end of the instruction, and the template holds everything around both.
"""

from __future__ import annotations

from typing import TypedDict

from llamafactory_sekd.data.languages import Direction, language_name


PREFACE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
# Nothing stands between this heading and the translation.
CLOSING = "\n\n### Response:"


class AlpacaRecord(TypedDict):
    """One training example in LLaMA-Factory's ``alpaca`` format."""

    instruction: str
    input: str
    output: str


def instruction(direction: Direction) -> str:
    """Return what stands before the source sentence: the order to translate and the input's heading."""
    source, target = language_name(direction.source), language_name(direction.target)
    return f"Translate the following sentences from {source} to {target}.\n\n### Input:"


def record(source: str, target: str, direction: Direction) -> AlpacaRecord:
    """Return the training example whose response is ``target``."""
    return {"instruction": instruction(direction), "input": source, "output": target}


def user_message(source: str, direction: Direction) -> str:
    """Return the user's turn as LLaMA-Factory builds it from a record; the template ``parrot`` goes around it."""
    return f"{instruction(direction)}\n{source}"


def prompt(source: str, direction: Direction) -> str:
    """Return the whole prompt, up to and including ``### Response:``."""
    return f"{PREFACE}{user_message(source, direction)}{CLOSING}"
