"""Starting again after a kill: from the last whole checkpoint, and with the teacher that it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.host.model_arguments import teacher_identity


def resume_from_whole_checkpoint(training_args: Any) -> None:
    """Choose the checkpoint to resume from, before the host would choose the last one, half-written or not.

    Only where the host would resume by itself: `output_dir` exists, and neither `resume_from_checkpoint` nor
    `overwrite_output_dir` is set.
    """
    overwrites = getattr(training_args, "overwrite_output_dir", False)
    if training_args.resume_from_checkpoint is not None or overwrites or not training_args.do_train:
        return

    if not training_args.output_dir or not Path(training_args.output_dir).is_dir():
        return

    from llamafactory_sekd.trainer.checkpoints import find_checkpoints

    whole, half_written = find_checkpoints(training_args.output_dir)
    if not half_written:
        return

    names = ", ".join(path.name for path in half_written)
    if whole is None:
        training_args.overwrite_output_dir = True  # or the host would take the half-written one
        remedy = "no whole one is there: the training starts from its beginning"
    else:
        training_args.resume_from_checkpoint = str(whole)
        remedy = f"the training resumes from {whole.name}"

    if training_args.process_index == 0:
        print(
            f"llamafactory_sekd: {names} in {training_args.output_dir} was interrupted while it was written; {remedy}."
        )


def teacher_fingerprint(model_args: Any, training_args: Any, finetuning_args: DistillationArguments) -> str | None:
    """Return what a checkpoint records of the teacher: a digest or its Hub id; None where nothing is saved.

    Reads every byte of the teacher's files, on the process that writes checkpoints only.
    """
    saves = training_args.do_train and str(getattr(training_args.save_strategy, "value", "no")) != "no"
    if training_args.process_index != 0 or not finetuning_args.teacher_model or not saves:
        return None

    return _fingerprint(*teacher_identity(model_args, finetuning_args))


def check_same_teacher(training_args: Any, finetuning_args: DistillationArguments, fingerprint: str | None) -> None:
    """Check that a resumed run goes on with the teacher that its checkpoint was trained with.

    Raises:
        TeacherError: it does not.
    """
    checkpoint = training_args.resume_from_checkpoint
    if not isinstance(checkpoint, str) or not Path(checkpoint).is_dir():
        return

    from llamafactory_sekd.trainer.checkpoints import STATE_NAME, DistillationState

    recorded = DistillationState.load(checkpoint).teacher
    if None not in (recorded, fingerprint) and recorded != fingerprint:
        raise TeacherError(
            f"`teacher_model: {finetuning_args.teacher_model}` is not the teacher that {checkpoint} was trained with: "
            "its files, its adapters or its quantization have changed. Bring the old teacher back, start anew with "
            f"another `output_dir`, or delete {STATE_NAME} there to go on with the new one."
        )


def _fingerprint(model: str, adapters: str | None, quantization_bit: int | None) -> str:
    from llamafactory_sekd.teacher.cache import fingerprints

    parts = []
    for name in filter(None, (model, *(adapters or "").split(","))):
        folder = Path(name).expanduser()
        parts.append(fingerprints.of_folder(folder) if folder.is_dir() else name)

    return " ".join([*parts, *([f"{quantization_bit} bit"] if quantization_bit else [])])
