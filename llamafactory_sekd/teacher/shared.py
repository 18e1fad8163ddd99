"""A teacher that is the student's own base model, with other adapters or none: loaded once, switched for each pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftModel
from torch import nn

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.teacher.model import Teacher


def add_teacher_adapters(student: nn.Module, adapters: Sequence[str], **hub: Any) -> list[str]:
    """Load a teacher's adapters next to the student's own; to be done before the student is placed or wrapped.

    The student stays as it is: its adapter is the active one, what it trains it goes on training, and what it saves is
    its adapter alone.

    Args:
        student: the student, a model with one adapter of its own.
        adapters: folders or hub ids; the teacher is the base with all of them.
        hub: how to fetch them, as for ``PeftModel.load_adapter``.

    Returns:
        The names that they have now.

    Raises:
        TeacherError: the student has no adapter of its own, or an adapter cannot be loaded onto its base.
    """
    if not isinstance(student, PeftModel):
        raise TeacherError(
            "`teacher_model: self` needs the student's adapter apart from its base, and evaluation without training "
            "merges them: name the base under `teacher_model` instead."
        )

    own = student.active_adapter
    student.save_pretrained = partial(student.save_pretrained, selected_adapters=[own])
    trained = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    names = [f"teacher_{number}" for number in range(len(adapters))]
    for name, folder in zip(names, adapters, strict=True):
        try:
            student.load_adapter(folder, name, is_trainable=False, torch_device="cpu", **hub)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            line = " ".join(str(error).split())
            raise TeacherError(
                f"`teacher_model_adapters: {folder}` cannot be loaded onto the student's base ({line}): an adapter of "
                "this base is needed, of the student's kind, without trained biases."
            ) from error

    student.set_adapter(own)  # only now PEFT takes out the modules that an adapter replaces completely
    for parameter in student.parameters():  # loading an adapter freezes the others
        parameter.requires_grad_(id(parameter) in trained)

    if len(names) > 1 and any(_is_no_sum(student.peft_config[name]) for name in names):
        raise TeacherError(
            f"`teacher_model_adapters: {','.join(adapters)}` cannot be added up, as one of them uses DoRA or saves "
            "complete modules: merge them into a model and name it under `teacher_model`."
        )

    return names


def _is_no_sum(config: Any) -> bool:
    return bool(getattr(config, "modules_to_save", None) or getattr(config, "use_dora", False))


class SharedTeacher(Teacher):
    """The student's base with other adapters, or without any.

    Its forward passes run on the student's own modules: in evaluation mode, so without dropout and without gradient
    checkpointing, whatever mode the student is in. Afterwards the student is as it was.

    Args:
        student: the student, which its own engine places and shards.
        adapters: the names from :func:`add_teacher_adapters`; none for the base alone.
    """

    def __init__(self, student: Any, adapters: Sequence[str]) -> None:
        self.model: Any = student
        self.head = student.get_output_embeddings()
        self.device = None
        self.adapters = list(adapters)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        own = self.model.active_adapter
        training = [module for module in self.model.modules() if module.training]
        self._switch(self.adapters)
        self.model.eval()
        try:
            yield
        finally:
            self._switch([own])
            for module in training:
                module.training = True

    def _switch(self, adapters: list[str]) -> None:
        """Make adapters the active ones, or none of them.

        PEFT changes which parameters are trained as it does so; that has to stay as the student's engine found it.
        """
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        tuner = self.model.base_model
        if len(adapters) > 1:
            tuner.set_adapter(adapters)
        elif self.adapters:
            self.model.set_adapter(adapters[0])
        elif adapters:
            tuner.enable_adapter_layers()
        else:
            tuner.disable_adapter_layers()

        for parameter, trained in before:
            parameter.requires_grad = trained
