"""The host's arguments of one run, our words for data sets that it does not find, the checkpoint to go on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from llamafactory_sekd.checkpoints import defect_of, find_checkpoints, has_optimizer
from llamafactory_sekd.data.alma import DEFAULT_OUT, command_for
from llamafactory_sekd.errors import ArgumentError, DataError


@dataclass(frozen=True)
class HostArguments:
    """What the host's parser makes of a run's keys.

    ``finetuning`` has our keys, as :class:`llamafactory_sekd.arguments.DistillationArguments`.
    """

    model: Any
    data: Any
    training: Any
    finetuning: Any
    generating: Any

    @property
    def is_first_rank(self) -> bool:
        """Tell whether this process is the one that writes and speaks."""
        return bool(self.training.process_index == 0)


def explain_undefined(get_dataset_list: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's look-up in ``dataset_info.json``: our names get a :class:`DataError`, others what they got."""

    @wraps(get_dataset_list)
    def look_up(dataset_names: list[str] | None, dataset_dir: Any) -> Any:
        try:
            return get_dataset_list(dataset_names, dataset_dir)
        except ValueError as error:
            ours = [name for name in dataset_names or [] if command_for(name)]
            unreadable = str(error).startswith("Cannot open")
            for name in ours:
                if unreadable or f"Undefined dataset {name} in" in str(error):
                    raise DataError(
                        f"Data set {name!r} is not declared in `dataset_dir: {dataset_dir}`: "
                        f"run `{command_for(name)}` and set `dataset_dir: {DEFAULT_OUT}`."
                    ) from error
            raise

    return look_up


def explain_missing_file(load_single_dataset: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's loader of one data set: for a missing file of ours it raises a :class:`DataError`."""

    @wraps(load_single_dataset)
    def load(dataset_attr: Any, model_args: Any, data_args: Any, training_args: Any) -> Any:
        if dataset_attr.load_from == "file":
            path = Path(data_args.dataset_dir, dataset_attr.dataset_name)
            command = command_for(path.stem, path.parent)
            if command is not None and path.suffix == ".json" and not path.exists():
                raise DataError(
                    f"The file {path} of data set {path.stem!r} does not exist yet: run `{command}` to create it."
                )
        return load_single_dataset(dataset_attr, model_args, data_args, training_args)

    return load


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
