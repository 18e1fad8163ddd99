"""A teacher with prompts of its own: the configuration of its examples, which have the student's responses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llamafactory_sekd.errors import ArgumentError


_EVALUATION = ("eval_dataset", "do_eval")
# The teacher's prompts are longer than the student's; how long they may be is checked against the teacher.
_UNCUT = 2**30


@dataclass(frozen=True)
class TeacherPrompts:
    """What the teacher reads in place of the student's prompts; None for what stays the student's.

    Attributes:
        dataset: data sets with the student's responses and other prompts, separated by commas: one for each of
            `dataset` and, to answer them as well, of `eval_dataset`.
        template: the template of its prompts.
        system: its system prompt.
    """

    dataset: str | None = None
    template: str | None = None
    system: str | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.dataset, self.template, self.system))


def configurations(config: dict[str, Any], prompts: TeacherPrompts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configurations of the student's examples and of the teacher's.

    Evaluation sets are left out of both where `prompts.dataset` names none for them.

    Raises:
        ArgumentError: the numbers of data sets differ, or examples have no response of their own.
    """
    unpacked = "an unpacked cache serves `neat_packing` as well: add packing=false neat_packing=false"
    reasons = {"packing": unpacked, "neat_packing": unpacked, "train_on_prompt": "the prompts differ: set it to false"}
    for key, remedy in reasons.items():
        if config.get(key):
            raise ArgumentError(
                f"`{key}: {config[key]}` cannot be used with a teacher that reads other prompts; {remedy}."
            )

    training, evaluation = names_of_data_sets(config.get("dataset")), names_of_data_sets(config.get("eval_dataset"))
    asked = names_of_data_sets(prompts.dataset) if prompts.dataset is not None else training + evaluation
    if len(asked) not in (len(training), len(training) + len(evaluation)):
        wanted = f"{len(training)} for `dataset: {','.join(training)}`"
        more = f", and {len(evaluation)} more to answer `eval_dataset`" if evaluation else ""
        raise ArgumentError(
            f"`--teacher-dataset {prompts.dataset}` names {len(asked)} data sets: name {wanted}{more}."
        )

    student = dict(config)
    if len(asked) == len(training):
        student = {key: value for key, value in config.items() if key not in _EVALUATION}

    teacher = {key: value for key, value in student.items() if key != "tokenized_path"}
    teacher |= {"dataset": ",".join(asked[: len(training)]), "cutoff_len": _UNCUT}
    if len(asked) > len(training):
        teacher["eval_dataset"] = ",".join(asked[len(training) :])
    if prompts.template is not None:
        teacher["template"] = prompts.template
    if prompts.system is not None:
        teacher["default_system"] = prompts.system

    return student, teacher


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


def names_of_data_sets(value: Any) -> list[str]:
    """Return the names that `dataset` or `eval_dataset` holds, as a list or separated by commas."""
    names = value if isinstance(value, list) else str(value or "").split(",")
    return [str(name).strip() for name in names if str(name).strip()]
