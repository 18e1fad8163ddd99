"""The frozen teacher inside the training process: placed next to the student, or the student's own base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import nn

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.lm_head import (
    hidden_states_of,
    is_plain_product,
    logit_transform,
    rows_of,
    selected_rows,
    whole_parameters,
)
from llamafactory_sekd.objectives import IDENTITY, LogitsSource, LogitTransform
from llamafactory_sekd.teacher.source import Answers, TeacherSource, product


# Parts of a DeepSpeed configuration that a model without an optimizer has no use for.
_OF_TRAINING = ("optimizer", "scheduler", "gradient_clipping", "data_efficiency", "curriculum_learning")
# Parts that DeepSpeed insists on, or that both engines must agree on.
_OF_THE_RUN = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_TYPES = ("bf16", "fp16")


@dataclass(frozen=True)
class Placement:
    """Placement of a teacher.

    Attributes:
        device: the device of its own, None where it shares the student's.
        offload: whether its weights rest in main memory between forward passes.
        engine: the DeepSpeed configuration that the user wrote for it, None for one derived from the student's.
    """

    device: torch.device | None = None
    offload: bool = False
    engine: Mapping[str, Any] | None = None


def engine_config(student: Mapping[str, Any], own: Mapping[str, Any] | None, offload: bool) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a teacher's engine.

    Args:
        student: the configuration of the student's engine, its batch sizes filled in.
        own: the configuration that the user wrote for the teacher; None to derive it from the student's.
        offload: whether parameters that are sharded rest in main memory.

    Returns:
        A configuration without what belongs to training. Stage 3 stays; the others, which shard what belongs to an
        optimizer, become 0.
    """
    config = deepcopy(dict(student if own is None else own))
    for key in _OF_TRAINING:
        config.pop(key, None)

    config.update({key: student[key] for key in _OF_THE_RUN if key in student})
    for key in _TYPES:
        if config.get(key, {}).get("enabled", "auto") == "auto" and key in student:
            config[key] = deepcopy(student[key])

    zero = config.setdefault("zero_optimization", {})
    zero.pop("offload_optimizer", None)
    if zero.get("stage", 0) != 3:
        zero["stage"] = 0
    elif offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}

    return config


def place(model: nn.Module, head: nn.Module, accelerator: Any, placement: Placement) -> nn.Module:
    """Place and shard a frozen model; what is not said otherwise is as the student's.

    Args:
        model: the model, loaded.
        head: its head, which is read outside of forward passes as well.
        accelerator: the trainer's.
        placement: where it shall stand.
    """
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        return model  # bitsandbytes has put it on its device already
    is_apart = placement.device is not None or placement.offload
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        config = engine_config(plugin.deepspeed_config, placement.engine, placement.offload)
        if config["zero_optimization"]["stage"] == 3 or not is_apart:
            import deepspeed

            return deepspeed.initialize(model=model, config=config)[0]

    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return _shard_by_fsdp(model, accelerator)
    if not is_apart:
        return accelerator.prepare_model(model, evaluation_mode=True)
    device = placement.device or accelerator.device
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    if not placement.offload:
        return model.to(device)
    # A rank without an accelerator is called `cpu:0`, which its tensors' device is not equal to.
    _rest_in_main_memory(model, head, torch.device("cpu") if device.type == "cpu" else device)
    return model


def is_flat(model: nn.Module) -> bool:
    """FSDP1 keeps parameters in one flat tensor, which is gathered only inside of a forward pass."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(model, FullyShardedDataParallel)


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of a placed model needs all ranks (ZeRO-3, FSDP)."""
    from torch.distributed.tensor import DTensor

    of_parameters = any(hasattr(part, "ds_id") or isinstance(part, DTensor) for part in model.parameters())
    return of_parameters or is_flat(model)


def _shard_by_fsdp(model: nn.Module, accelerator: Any) -> nn.Module:
    if getattr(accelerator, "is_fsdp2", False):
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    from trl.models.utils import prepare_fsdp

    return prepare_fsdp(model, accelerator)


def _rest_in_main_memory(module: nn.Module, head: nn.Module, device: torch.device) -> None:
    """Let accelerate fetch the weights of each layer for its forward pass; the head alone stays on the device.

    Hooks on the head would get in the way of :func:`llamafactory_sekd.lm_head.replaced_forward`.
    """
    for child in module.children():
        if child is head:
            child.to(device)
        elif any(part is head for part in child.modules()):
            _rest_in_main_memory(child, head, device)
        else:
            cpu_offload(child, execution_device=device)


class Teacher(TeacherSource):
    """A frozen causal language model that returns response rows: its logits, or its hidden states and its head.

    Args:
        model: the model, loaded and not yet placed.
        accelerator: the trainer's accelerator; the teacher is sharded and placed where it puts models.
        placement: its placement otherwise.
    """

    def __init__(self, model: nn.Module, accelerator: Any, placement: Placement | None = None) -> None:
        placement = placement or Placement()
        model.requires_grad_(False)
        self.head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self.transform: LogitTransform | None = None
        self.device = placement.device
        self.model: nn.Module = place(model, self.head, accelerator, placement)
        self.model.eval()
        self.is_sharded = is_sharded(self.model)

    def logit_transform(self, inputs: dict[str, Any]) -> LogitTransform | None:
        """Return what makes its logits of head times hidden states; None where nothing does that can be kept.

        None as well where the head cannot be read outside of a forward pass.
        """
        if not is_plain_product(self.head) or is_flat(self.model):
            return None
        with self._speaking():
            return logit_transform(self.model, self.head, self._there(inputs))

    @torch.no_grad()
    def logits(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Teacher logits ``[tokens, vocab]`` at the response positions.

        Args:
            inputs: the batch as the student sees it (ids, attention mask, position ids), without labels.
            rows: ``[batch, length]`` bool, from :func:`llamafactory_sekd.objectives.response_positions`.
        """
        with self._speaking(), selected_rows(self.head, rows_of(rows)):
            return self.model(**self._there(inputs), use_cache=False).logits[0].to(rows.device)

    @torch.no_grad()
    def hidden_states(self, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
        """Teacher hidden states ``[tokens, width]`` at the response positions, as its head would read them."""
        with self._speaking():
            found = hidden_states_of(
                self.head, lambda: self.model(**self._there(inputs), use_cache=False), rows_of(rows)
            )
        return found.to(rows.device)

    def can_answer_in_chunks(self, inputs: dict[str, Any]) -> bool:
        """Where its logits are a product that can be formed anywhere, scaled or capped."""
        self.transform = self.logit_transform(inputs)
        return self.transform is not None

    def answers(self, inputs: dict[str, Any], rows: torch.Tensor) -> Answers:
        """One forward pass; see :class:`TeacherSource`."""
        hidden = self.hidden_states(inputs, rows)

        @contextmanager
        def opened(vocab_size: int | None) -> Iterator[LogitsSource]:
            with self.head_parameters() as (weight, bias):
                bias = None if bias is None else bias.to(hidden.device)
                yield product(hidden, weight.to(hidden.device), bias, vocab_size, self.transform or IDENTITY)

        return opened

    @contextmanager
    def head_parameters(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight ``[vocab, width]`` and bias ``[vocab]`` (or None) of the head, complete, for the duration."""
        with whole_parameters(self.head) as parameters:
            yield parameters

    def _speaking(self) -> AbstractContextManager[None]:
        """Hold what has to hold while the model computes."""
        return nullcontext()

    def _there(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch on the teacher's device."""
        return inputs if self.device is None else send_to_device(inputs, self.device)


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
