"""A training run whose teacher comes from a cache: opened and checked before any model is read, closed at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import TrainerCallback

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.host.cache import autocast_type, fingerprints_of, used_ids
from llamafactory_sekd.teacher import Teacher
from llamafactory_sekd.teacher.cache import (
    CacheCollator,
    CachedTeacher,
    FillingTeacher,
    Manifest,
    Session,
    ShardReader,
    first_missing,
    missing_example,
    on_any_rank,
    open_for_reading,
)
from llamafactory_sekd.teacher.source import TeacherSource


class CacheOfRun:
    """The cache of one training run.

    Without ``teacher_model`` it must hold every example of the run, and this is checked here. With it, the teacher is
    needed only where an example is missing, and what it computes is kept.

    Args:
        model_args, data_args, training_args, finetuning_args: the run's.
        trainer_arguments: what the host hands to its trainer: tokenizer, data sets, collator.

    Attributes:
        needs_model: whether the teacher has to be loaded.

    Raises:
        TeacherError: the cache is of something else, is damaged, or lacks an example.
    """

    def __init__(
        self,
        model_args: Any,
        data_args: Any,
        training_args: Any,
        finetuning_args: Any,
        trainer_arguments: dict[str, Any],
    ) -> None:
        self.directory = Path(finetuning_args.teacher_cache)
        self.device = training_args.device
        self.tokenizer = trainer_arguments["tokenizer"]
        template = trainer_arguments["data_collator"].template
        run = fingerprints_of(self.tokenizer, template, model_args, data_args, finetuning_args)
        datasets = _datasets(trainer_arguments, training_args)
        self.session: Session | None = None
        self.manifest: Manifest | None
        if finetuning_args.teacher_model:
            self._open_for_filling(run, datasets)
        else:
            self._open_for_reading(run, datasets, verify=training_args.process_index == 0)

    @property
    def needs_model(self) -> bool:
        """Whether anything is missing."""
        return self.session is not None

    @property
    def vocab_size(self) -> int | None:
        """How many ids the teacher's answers are over; None for a cache that is not there yet."""
        return None if self.manifest is None else self.manifest.vocab_size

    def make_teacher(self, make_online: Callable[[Any], Teacher] | None, accelerator: Any) -> TeacherSource:
        """Return the teacher that the trainer asks; `make_online` makes the one needed where something is missing."""
        if self.session is None:
            assert self.manifest is not None
            return CachedTeacher(self.directory, self.manifest.kept(), self.device, self._text)

        assert make_online is not None
        online = make_online(accelerator)
        probe = {"input_ids": torch.zeros(1, 8, dtype=torch.int64, device=self.device)}
        self.manifest = self.session.admit(online, used_ids(self.tokenizer), probe, autocast_type(accelerator))
        return FillingTeacher(
            self.directory,
            self.manifest.kept(),
            self.device,
            self._text,
            online=online,
            writer=self.session.writer(),
            reader=self.reader,
        )

    def attach(self, trainer: Any) -> None:
        """Let the trainer's batches bring the teacher's answers, and keep what it computes."""
        assert self.manifest is not None
        trainer.data_collator = CacheCollator(trainer.data_collator, self.reader, self.manifest.kept())
        if self.session is not None:
            trainer.add_callback(_Keep(trainer.teacher))

    def __enter__(self) -> CacheOfRun:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.session is not None:
            self.session.close()

    def _open_for_reading(self, run: Any, datasets: list[Any], *, verify: bool) -> None:
        self.manifest = open_for_reading(self.directory, run, verify=verify)
        self.reader = ShardReader(self.directory)
        missing = first_missing(datasets, self.reader)
        if missing is not None:
            raise TeacherError(missing_example(self.directory, self._text(torch.from_numpy(missing.ids))))

    def _open_for_filling(self, run: Any, datasets: list[Any]) -> None:
        session = Session(self.directory, run)
        self.manifest, self.reader = session.manifest, session.reader
        lacks = not session.head_is_intact or not datasets or first_missing(datasets, self.reader) is not None
        if on_any_rank(torch.tensor(lacks, device=self.device)):
            self.session = session
        else:
            session.close()

    def _text(self, ids: torch.Tensor) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)


class _Keep(TrainerCallback):
    """Writes what the teacher computed whenever the trainer itself comes to rest."""

    def __init__(self, teacher: FillingTeacher) -> None:
        self.teacher = teacher

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.teacher.flush()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.teacher.flush()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.teacher.flush()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.teacher.flush()


def _datasets(trainer_arguments: dict[str, Any], training_args: Any) -> list[Any]:
    """Return the data sets that the run will ask the teacher about; none where they are streamed."""
    found = [trainer_arguments.get("train_dataset")] if training_args.do_train else []
    evaluation = trainer_arguments.get("eval_dataset")
    if training_args.do_eval and not training_args.predict_with_generate:
        found += list(evaluation.values()) if isinstance(evaluation, dict) else [evaluation]

    return [dataset for dataset in found if hasattr(dataset, "__len__")]
