"""The teacher of a run on the host's side: its arguments, whether it fits the student, loading it, its fingerprint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import patch_environment

from llamafactory_sekd.arguments import SELF, DistillationArguments
from llamafactory_sekd.checkpoints import STATE_NAME, DistillationState
from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.fingerprints import xxh3_of_model
from llamafactory_sekd.host.run_arguments import HostArguments, own_device, read_deepspeed_file


if TYPE_CHECKING:
    from llamafactory_sekd.teacher import Placement, Teacher, TeacherSource


# The student's model arguments that hold for the teacher as well, each with its reason. All others belong to the
# student: `add_tokens` or `resize_vocab` would give the teacher rows that it has never learned, `rope_scaling` and
# `shift_attn` another model than the one that was trained.
SHARED_ARGUMENTS: dict[str, str] = {
    "cache_dir": "where downloads go",
    "use_fast_tokenizer": "both tokenizers are compared, and one of them makes the ids of both",
    "split_special_tokens": "both tokenizers are compared, and one of them makes the ids of both",
    "low_cpu_mem_usage": "how weights are read on this machine",
    "flash_attn": "the attention kernel of this machine",
    "trust_remote_code": "the user's permission",
    "hf_hub_token": "the user's access",
    "ms_hub_token": "the user's access",
    "om_hub_token": "the user's access",
    "quantization_method": "how `teacher_model_quantization_bit` quantizes",
    "quantization_type": "how `teacher_model_quantization_bit` quantizes",
    "double_quantization": "how `teacher_model_quantization_bit` quantizes",
    "quantization_device_map": "where bitsandbytes puts what it quantizes",
    "offload_folder": "where weights go that fit nowhere else",
    "infer_dtype": "the type of a model that is not trained",
    "compute_dtype": "the run's precision, which the host sets",
    "device_map": "the rank's device, which the host sets",
    "model_max_length": "the run's longest example, which the host sets",
    "block_diag_attn": "the mask of packed examples, which both models read",
}
_SPLIT = ("add_tokens", "add_special_tokens", "adapter_name_or_path")


def teacher_identity(model_args: Any, finetuning_args: DistillationArguments) -> tuple[str, str | None, int | None]:
    """Return what decides the teacher's answers: its model, its adapters, its bits; `self` is the student's base."""
    adapters = finetuning_args.teacher_model_adapters
    if finetuning_args.teacher_model == SELF:
        return model_args.model_name_or_path, adapters, model_args.quantization_bit
    name = str(finetuning_args.teacher_model)
    home = name if not name.startswith("~") else str(Path(name).expanduser())
    return home, adapters, finetuning_args.teacher_model_quantization_bit


def each_teacher(run: HostArguments) -> list[HostArguments]:
    """Return the run with each of the models that it has as teachers; itself where all data sets have the same."""
    models = run.finetuning.teacher_model
    if not isinstance(models, dict):
        return [run]
    found = []
    for model in dict.fromkeys(models.values()):
        found.append(replace(run, finetuning=copy(run.finetuning)))
        found[-1].finetuning.teacher_model = model
    return found


def teacher_model_arguments(model_args: Any, finetuning_args: DistillationArguments) -> Any:
    """Return the host's model arguments for a teacher that is loaded: ours, and those that both models share."""
    from llamafactory.hparams import ModelArguments

    model, adapters, quantization_bit = teacher_identity(model_args, finetuning_args)
    shared = {*SHARED_ARGUMENTS, *(("rope_scaling",) if finetuning_args.teacher_model == SELF else ())}
    students = {item.name: item.default for item in fields(ModelArguments) if item.name not in shared}
    copy = copy_model_arguments(
        model_args,
        **{
            **students,
            "model_name_or_path": model,
            "adapter_name_or_path": adapters,
            "quantization_bit": quantization_bit,
        },
    )
    device = own_device(finetuning_args)
    if finetuning_args.teacher_offload or device is not None:  # or it would pass through the student's device
        copy.device_map = {"": torch.device("cpu") if finetuning_args.teacher_offload else device}

    return copy


def copy_model_arguments(source: Any, **changes: Any) -> Any:
    """Copy model arguments with changes.

    The host's `copyfrom` does this, but splits what its first construction has split already: lists become the
    comma-separated texts that it expects.
    """
    from llamafactory.hparams import ModelArguments

    values = {key: getattr(source, key) for key in _SPLIT}
    texts = {key: ",".join(value) for key, value in values.items() if isinstance(value, list)}
    return ModelArguments.copyfrom(source, **{**texts, **changes})


def check_fit(run: HostArguments, *, logged: bool = True) -> list[str]:
    """Check, before any weight is read, that each teacher exists, is a causal LM and has the student's tokenizer.

    Args:
        run: its arguments.
        logged: whether the log gets the lines that are returned.

    Returns:
        What else is to be said of them.

    Raises:
        TeacherError: one does not fit.
    """
    from transformers.utils import logging

    lines = [line for one in each_teacher(run) if (line := _check_fit(one))]
    for line in lines if logged else ():
        logging.get_logger(__name__).warning(line)
    return lines


def _check_fit(run: HostArguments) -> str:
    """Return what is to be said of a teacher's positions."""
    from llamafactory.model import load_config, load_tokenizer

    from llamafactory_sekd.teacher.compatibility import (
        check_adapter_files,
        check_is_causal,
        check_teacher_files,
        check_tokenizers,
        positions_line,
    )

    name, adapters, _ = teacher_identity(run.model, run.finetuning)
    check_teacher_files(name)
    check_adapter_files(adapters.split(",") if adapters else [])
    teacher_args = teacher_model_arguments(run.model, run.finetuning)
    try:
        config = load_config(teacher_args)
        teacher_tokenizer = load_tokenizer(teacher_args)["tokenizer"]
    except OSError as error:
        cause = error.__cause__ or error
        raise TeacherError(
            f"`teacher_model: {name}` cannot be loaded ({_first_line(cause)}): check the path or hub id."
        ) from error

    check_is_causal(name, config)
    student_tokenizer = load_tokenizer(run.model)["tokenizer"]
    _apply_template(student_tokenizer, teacher_tokenizer, run.data)
    check_tokenizers(student_tokenizer, teacher_tokenizer)
    if run.finetuning.teacher_model == SELF and run.model.rope_scaling is not None:
        return ""  # the base has the student's positions
    return positions_line(name, config, run.data.cutoff_len)


def _apply_template(student: Any, teacher: Any, data_args: Any) -> None:
    """Let the run's template act on both tokenizers, as the host lets it act before training.

    A chat template writes its end token into the tokenizer, and fine-tuning saves it; so a teacher that the host
    fine-tuned and the base model of its family differ in it until the template has acted on both. Where the template
    leaves the end token alone, the student's is that of the text, and the teacher reads the same ids.
    """
    from llamafactory.data import get_template_and_fix_tokenizer
    from transformers.utils import logging

    before = [tokenizer.eos_token for tokenizer in (student, teacher)]
    for tokenizer in (student, teacher):
        get_template_and_fix_tokenizer(tokenizer, data_args)

    logger = logging.get_logger(__name__)
    own = teacher.eos_token
    if own != student.eos_token and teacher.get_vocab().get(student.eos_token) == student.eos_token_id:
        teacher.eos_token = student.eos_token
        logger.warning(
            f"Responses end with the student's {student.eos_token!r}; the teacher was saved with {own!r} and may give "
            f"the other a low probability. The template `{data_args.template}` sets neither."
        )
    elif before[0] != before[1]:
        logger.warning(
            f"Student and teacher both use the end token {student.eos_token!r} of the template `{data_args.template}` "
            f"(saved with the student: {before[0]!r}, with the teacher: {before[1]!r})."
        )


def load_teacher(run: HostArguments) -> Any:
    """Load the teacher as the host loads a reference model: adapters merged, quantized, frozen, in eval mode."""
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.model import load_model, load_tokenizer
    from safetensors import SafetensorError

    teacher_args = teacher_model_arguments(run.model, run.finetuning)
    tokenizer = load_tokenizer(teacher_args)["tokenizer"]
    try:
        with _whole_weights_on_every_rank(), _teachers_deepspeed(run):
            return load_model(tokenizer, teacher_args, FinetuningArguments(), is_trainable=False)
    except (OSError, SafetensorError) as error:
        raise TeacherError(
            f"the weights of `teacher_model: {teacher_args.model_name_or_path}` cannot be loaded "
            f"({_first_line(error)}): check that all its files are present and complete."
        ) from error


def online_teacher(run: HostArguments, student: Any, used: int) -> tuple[Callable[[Any], TeacherSource], list[int]]:
    """Load the teachers that compute; return what makes the run's from the trainer's accelerator, and rows to read.

    `used` are the ids that the tokenizer uses.
    """
    from llamafactory_sekd.teacher import SeveralTeachers

    models = run.finetuning.teacher_model
    loaded = [_loaded(one, student, used) for one in each_teacher(run)]
    makers, rows = [make for make, _ in loaded], [count for _, count in loaded]
    if not isinstance(models, dict):
        return makers[0], rows
    places = {model: place for place, model in enumerate(dict.fromkeys(models.values()))}
    numbers = [places[model] for model in models.values()]
    return lambda accelerator: SeveralTeachers([make(accelerator) for make in makers], list(models), numbers), rows


def _loaded(run: HostArguments, student: Any, used: int) -> tuple[Callable[[Any], Teacher], int]:
    from llamafactory_sekd.teacher import SharedTeacher, Teacher, add_teacher_adapters, readable_rows

    if run.finetuning.teacher_model == SELF:
        adapters = run.finetuning.teacher_model_adapters
        hub = {
            "cache_dir": run.model.cache_dir,
            "revision": run.model.model_revision,
            "token": run.model.hf_hub_token,
        }
        rows = head_rows(student)
        names = add_teacher_adapters(student, adapters.split(",") if adapters else [], **hub)
        return lambda _: SharedTeacher(student, names), rows
    model = load_teacher(run)
    placement = placement_of(run.finetuning)
    head = model.get_output_embeddings()
    # Sharded weights (ZeRO-3) are empty here, and a matrix that bitsandbytes has packed has other rows.
    padding = [part.detach()[used:] for part in (head.weight, getattr(head, "bias", None)) if part is not None]
    rows = readable_rows(used, head_rows(model), [part for part in padding if part.is_floating_point()])
    return lambda accelerator: Teacher(model, accelerator, placement), rows


def head_rows(model: Any) -> int:
    """Return how many rows a model's head has, sharded or not."""
    weight = model.get_output_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def placement_of(finetuning_args: DistillationArguments) -> Placement:
    """Return where the teacher of a parsed run is placed."""
    from llamafactory_sekd.teacher import Placement

    own = finetuning_args.teacher_deepspeed
    engine = None if own is None else read_deepspeed_file("teacher_deepspeed", own)
    return Placement(own_device(finetuning_args), finetuning_args.teacher_offload, engine)


@contextmanager
def _teachers_deepspeed(run: HostArguments) -> Iterator[None]:
    """For the duration, transformers loads weights as the teacher's engine shards them, not the student's."""
    plugin = getattr(run.training, "deepspeed_plugin", None)
    if plugin is None:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, deepspeed

    from llamafactory_sekd.teacher import engine_config

    placement, students = placement_of(run.finetuning), deepspeed._hf_deepspeed_config_weak_ref
    # It is the current one from here on, as long as it exists.
    teachers = HfDeepSpeedConfig(engine_config(plugin.deepspeed_config, placement.engine, placement.offload))
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = students
        del teachers


def _whole_weights_on_every_rank() -> AbstractContextManager[None]:
    """FSDP's RAM-efficient loading leaves a second model empty on every rank but the first: off for the duration."""
    key = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    return patch_environment(**{key: "false"}) if key in os.environ else nullcontext()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def teacher_fingerprint(run: HostArguments) -> str | None:
    """Return what a checkpoint records of the teacher: a digest or its Hub id; None where nothing is saved.

    Reads every byte of the teacher's files, on the process that writes checkpoints only.
    """
    training = run.training
    saves = training.do_train and str(getattr(training.save_strategy, "value", "no")) != "no"
    if not run.is_first_rank or not run.finetuning.teacher_model or not saves:
        return None
    models = run.finetuning.teacher_model
    digests = [_fingerprint(*teacher_identity(one.model, one.finetuning)) for one in each_teacher(run)]
    if not isinstance(models, dict):
        return digests[0]
    of_model = dict(zip(dict.fromkeys(models.values()), digests, strict=True))
    return " ".join(f"{name}={of_model[model]}" for name, model in sorted(models.items()))


def check_same_teacher(run: HostArguments, fingerprint: str | None) -> None:
    """Check that a resumed run goes on with the teacher that its checkpoint was trained with.

    Raises:
        TeacherError: it does not.
    """
    checkpoint = run.training.resume_from_checkpoint
    if not isinstance(checkpoint, str) or not Path(checkpoint).is_dir():
        return
    recorded = DistillationState.load(checkpoint).teacher
    if None not in (recorded, fingerprint) and recorded != fingerprint:
        raise TeacherError(
            f"`teacher_model: {run.finetuning.teacher_model}` is not the teacher that {checkpoint} was trained with: "
            "its files, its adapters or its quantization have changed. Use the old teacher, start again with "
            f"another `output_dir`, or delete {STATE_NAME} there to continue with the new one."
        )


def _fingerprint(model: str, adapters: str | None, quantization_bit: int | None) -> str:
    parts = []
    for name in filter(None, (model, *(adapters or "").split(","))):
        folder = Path(name).expanduser()
        parts.append(xxh3_of_model(folder) if folder.is_dir() else name)

    return " ".join([*parts, *([f"{quantization_bit} bit"] if quantization_bit else [])])
