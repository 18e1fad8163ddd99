"""The block at the start of a run that says what is trained, on what objective, by which teacher."""

from __future__ import annotations

from typing import Any

from llamafactory_sekd.arguments import SELF, STAGE, DistillationArguments, keys_read_by
from llamafactory_sekd.host.run_arguments import HostArguments
from llamafactory_sekd.host.teacher_loading import teacher_identity
from llamafactory_sekd.presets import PRESETS, preset_of


_SIGNS = {"kd_lambda": "λ", "kd_beta": "β", "kd_gamma": "Γ", "kd_topk": "hard share", "kd_hard_scale": "hard scale"}


def print_opening(run: HostArguments, trainer: Any) -> list[str]:
    """Print the block on the first rank, whatever the log level: a run that does something else is seen at once.

    Returns its lines, which the model card has as well.
    """
    lines = opening_lines(run, trainer)
    if trainer.args.process_index == 0:
        print("\n".join(lines), flush=True)
    return lines


def opening_lines(run: HostArguments, trainer: Any) -> list[str]:
    """Return the lines: objective, its equation and its formula, its keys, teacher, student, chunk size.

    Args:
        run: its arguments.
        trainer: the distillation trainer, with both models placed.
    """
    keys: DistillationArguments = run.finetuning
    student = trainer.accelerator.unwrap_model(trainer.model)
    trained, everything = _sizes(student)
    with trainer.autocast_smart_context_manager():  # the type of the products decides how many tokens fit
        size = trainer.chunk_size()
    rows = {
        "objective": _objective(keys.kd_loss),
        "formula": f"kd_loss: {keys.formula()}",
        "keys": _keys(keys),
        "teacher": _teacher(run, trainer.teacher),
        "student": (
            f"{run.model.model_name_or_path}, trains {trained:,} of {everything:,} parameters "
            f"({trained / max(everything, 1):.2%})"
        ),
        "chunks": f"{size:,} response tokens at a time in the LM head, where the head allows it (`kd_chunk_size`)",
    }
    return [f"Knowledge distillation (`stage: {STAGE}`)", *(f"  {name:<11}{text}" for name, text in rows.items())]


def _objective(kd_loss: Any) -> str:
    name = preset_of(kd_loss)
    if name is None:
        return "a mapping of your own"
    return f"{name}, changed" if isinstance(kd_loss, dict) else f"{name}: {PRESETS[name].equation}"


def _keys(keys: DistillationArguments) -> str:
    read = keys_read_by(keys.kd_loss)
    shown = {sign: getattr(keys, key) for key, sign in _SIGNS.items() if key in read}
    if "β" in shown and keys.kd_beta_end is not None:
        shown["β"] = f"{keys.kd_beta} to {keys.kd_beta_end}"
    if keys.kd_topk is not None:
        shown["hard share"] = keys.kd_topk
    return ", ".join(f"{sign} {value}" for sign, value in {**shown, "T": keys.kd_temperature}.items())


def _teacher(run: HostArguments, source: Any) -> str:
    from llamafactory_sekd.teacher import SeveralTeachers

    keys, parts = run.finetuning, []
    if keys.teacher_cache:
        parts.append(f"answers of {keys.teacher_cache}")
    if isinstance(keys.teacher_model, dict):
        parts += [f"{model} for {name}" for name, model in keys.teacher_model.items()]
    elif keys.teacher_model:
        name, adapters, bits = teacher_identity(run.model, keys)
        parts.append(name + (f" with {adapters}" if adapters else "") + (f" in {bits} bits" if bits else ""))

    if keys.teacher_server:
        parts.append(f"{source.server.info.model} at {keys.teacher_server}, {source.kept.name}")

    teacher = getattr(source, "online", source)
    model = getattr(teacher, "model", None)
    if isinstance(source, SeveralTeachers):
        sizes = [_sizes(one.model)[1] for one in source.teachers]
        parts.append(f"{sum(sizes):,} parameters in {len(sizes)} models")
    elif keys.teacher_model == SELF:
        parts.append("the student's own base, loaded once")
    elif model is not None:
        parts.append(f"{_sizes(model)[1]:,} parameters")
        parts.append(f"on {teacher.device}" if teacher.device is not None else "placed as the student is")
        if keys.teacher_offload:
            parts.append("its weights in main memory between passes")
    elif keys.teacher_model:
        parts.append("not loaded, since nothing is missing in the cache")
    return ", ".join(parts)


def _sizes(model: Any) -> tuple[int, int]:
    from llamafactory.extras.misc import count_parameters

    trained, everything = count_parameters(model)
    return int(trained), int(everything)
