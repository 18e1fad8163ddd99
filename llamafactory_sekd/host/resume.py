"""Starting again: from the last complete checkpoint, and with the teacher that it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamafactory_sekd.checkpoints import STATE_NAME, DistillationState, defect_of, find_checkpoints, has_optimizer
from llamafactory_sekd.errors import ArgumentError, TeacherError
from llamafactory_sekd.fingerprints import xxh3_of_model
from llamafactory_sekd.host.run_arguments import HostArguments
from llamafactory_sekd.host.teacher_loading import each_teacher, teacher_identity


def choose_checkpoint(training_args: Any) -> None:
    """Choose the checkpoint to resume from, by one rule for ``true``, a path, and a run that is started again.

    Only complete checkpoints count (see ``checkpoints``). The chosen one is written to ``resume_from_checkpoint``, so
    that everything after this, the check of the teacher included, sees the same one.

    Raises:
        ArgumentError: the user asks to resume and there is nothing complete to resume from.
    """
    asked = training_args.resume_from_checkpoint
    if isinstance(asked, str) and asked.lower() in ("true", "false") and not Path(asked).exists():
        asked = asked.lower() == "true"  # the command line knows text alone
    if asked is False:
        asked = training_args.resume_from_checkpoint = None
    overwrites = getattr(training_args, "overwrite_output_dir", False)
    if not training_args.do_train or not training_args.output_dir or (asked is None and overwrites):
        return

    save_only_model = bool(getattr(training_args, "save_only_model", False))
    if isinstance(asked, str):
        chosen = _named(Path(asked), save_only_model)
    else:
        chosen = _last(training_args, save_only_model, is_asked=asked is True)
    if chosen is None:
        return

    training_args.resume_from_checkpoint = str(chosen)
    if not has_optimizer(chosen):
        _tell(
            training_args,
            f"{chosen} has no optimizer state (`save_only_model: true`): the training continues with its weights, and "
            "an optimizer and a learning rate schedule that start again",
        )


def _named(checkpoint: Path, save_only_model: bool) -> Path | None:
    if not checkpoint.is_dir():
        raise ArgumentError(f"`resume_from_checkpoint: {checkpoint}` is not a folder: name a checkpoint, or true.")
    # A checkpoint that is named may be one of weights alone, whatever this run saves: that is told, not refused.
    defect = defect_of(checkpoint, save_only_model or not has_optimizer(checkpoint))
    if defect is not None:
        complete, _ = find_checkpoints(checkpoint.parent, save_only_model)
        remedy = f"use {complete}" if complete else "remove the key to start from the beginning"
        raise ArgumentError(f"`resume_from_checkpoint: {checkpoint}` is incomplete ({defect}): {remedy}.")
    return checkpoint


def _last(training_args: Any, save_only_model: bool, is_asked: bool) -> Path | None:
    complete, incomplete = find_checkpoints(training_args.output_dir, save_only_model)
    if is_asked and complete is None:
        raise ArgumentError(
            f"`resume_from_checkpoint: true`: {training_args.output_dir} holds no complete checkpoint: remove the key "
            "to start from the beginning."
        )
    if incomplete:
        names, defects = ", ".join(path.name for path in incomplete), ", ".join(dict.fromkeys(incomplete.values()))
        if complete is None:
            training_args.overwrite_output_dir = True  # or the host would take the incomplete one
            remedy = "there is no complete one: the training starts from its beginning"
        else:
            remedy = f"the training resumes from {complete.name}"
        _tell(
            training_args,
            f"{names} in {training_args.output_dir} was interrupted while it was written ({defects}); {remedy}",
        )
    return complete


def _tell(training_args: Any, text: str) -> None:
    if training_args.process_index == 0:
        print(f"llamafactory_sekd: {text}.")


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
