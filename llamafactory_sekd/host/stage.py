"""The stage: the host's own SFT workflow with our trainer in place of the host's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

from llamafactory_sekd.arguments import STAGE, DistillationArguments
from llamafactory_sekd.data.training_text import record_training_text
from llamafactory_sekd.errors import DataError, HostError
from llamafactory_sekd.evaluation.model_card import write_training
from llamafactory_sekd.host.cut_text import counting_cut_text
from llamafactory_sekd.host.own_samples import own_samples_of
from llamafactory_sekd.host.resume import check_same_teacher, teacher_fingerprint
from llamafactory_sekd.host.served_teacher import ServerOfRun, connect
from llamafactory_sekd.host.start_block import print_opening
from llamafactory_sekd.host.teacher_choice import numbered_examples
from llamafactory_sekd.host.teacher_loading import check_fit, head_rows, online_teacher


def dispatch(host_run_sft: Callable[..., None]) -> Callable[..., None]:
    """Wrap the host's ``run_sft``: runs that were asked for with ``stage: sekd`` get the distillation trainer."""

    @wraps(host_run_sft)
    def run_sft(
        model_args: Any,
        data_args: Any,
        training_args: Any,
        finetuning_args: Any,
        generating_args: Any,
        callbacks: Any = None,
    ) -> None:
        arguments = (model_args, data_args, training_args, finetuning_args, generating_args, callbacks)
        if getattr(finetuning_args, "use_sekd", False):
            _run_sekd(host_run_sft, *arguments)
        else:
            host_run_sft(*arguments)

    return run_sft


def refuse_our_stage(host_trainer: type) -> type:
    """Return the host's SFT trainer, which no run of our stage can be trained by.

    Whatever has kept our own trainer from being built, the run ends here and does not become plain fine-tuning.
    """

    class CustomSeq2SeqTrainer(host_trainer):
        __doc__ = host_trainer.__doc__

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            is_ours = getattr(kwargs.get("finetuning_args"), "use_sekd", False)
            does_work = any(getattr(kwargs.get("args"), key, False) for key in ("do_train", "do_eval"))
            if is_ours and does_work and not hasattr(self, "distillation_stage"):
                raise HostError(
                    f"`stage: {STAGE}` has reached the host's own trainer, which knows no teacher: start with "
                    "`llamafactory-cli` or `python -m llamafactory_sekd`."
                )
            super().__init__(*args, **kwargs)

    CustomSeq2SeqTrainer.__module__ = host_trainer.__module__
    CustomSeq2SeqTrainer.__qualname__ = host_trainer.__qualname__
    return CustomSeq2SeqTrainer


def _run_sekd(
    host_run_sft: Callable[..., None],
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    generating_args: Any,
    callbacks: Any,
) -> None:
    needs_teacher = training_args.do_train or training_args.do_eval
    if not needs_teacher:  # prediction alone is the host's
        host_run_sft(model_args, data_args, training_args, finetuning_args, generating_args, callbacks)
        return

    if finetuning_args.teacher_model:
        check_fit(model_args, data_args, finetuning_args)

    server = connect(model_args, data_args, finetuning_args) if finetuning_args.teacher_server else None
    of_run = None if server is None else ServerOfRun(server, training_args, finetuning_args)
    fingerprint = of_run.fingerprint if of_run else teacher_fingerprint(model_args, training_args, finetuning_args)
    check_same_teacher(training_args, finetuning_args, fingerprint)
    arguments = (model_args, data_args, training_args, finetuning_args)
    say = print if training_args.process_index == 0 else None
    with (
        numbered_examples(finetuning_args),
        counting_cut_text(finetuning_args.kd_max_cut, say),
        of_run or nullcontext(),
        _our_trainer(*arguments, generating_args, fingerprint, of_run) as opening,
        _empty_dataset_explained(data_args),
    ):
        host_run_sft(model_args, data_args, training_args, finetuning_args, generating_args, callbacks)

    if training_args.do_train and training_args.should_save and isinstance(data_args.dataset_dir, str):
        record_training_text(
            Path(training_args.output_dir), Path(data_args.dataset_dir), list(data_args.dataset or [])
        )
    if training_args.do_train and training_args.should_save and opening:
        # The host has just written the card; it names neither teacher nor objective.
        write_training(Path(training_args.output_dir) / "README.md", opening, data_args.dataset or [])
    if training_args.do_train and training_args.should_save and finetuning_args.plot_loss:
        from llamafactory_sekd.trainer import plot_distillation

        figure = plot_distillation(training_args.output_dir)
        if figure is not None:
            print("Figure saved at:", figure)


@contextmanager
def _our_trainer(
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: DistillationArguments,
    generating_args: Any,
    fingerprint: str | None,
    of_server: ServerOfRun | None,
) -> Iterator[list[str]]:
    """For the duration, the host's SFT workflow builds our trainer where it names its own.

    Gives the lines of the run's opening, once the trainer is built.
    """
    from transformers.utils import logging

    from llamafactory_sekd.host.cached_teacher import CacheOfRun
    from llamafactory_sekd.teacher import NumberCollator, SeveralTeachers, TeacherSource, common_vocabulary, used_ids
    from llamafactory_sekd.trainer import DistillationTrainer

    opening: list[str] = []
    workflow: Any = sys.modules["llamafactory.train.sft.workflow"]
    host_trainer = workflow.CustomSeq2SeqTrainer

    class SekdTrainer(DistillationTrainer, host_trainer):  # type: ignore[misc, valid-type]
        distillation_stage = STAGE

    def build(**kwargs: Any) -> Any:
        cache = None
        if finetuning_args.teacher_cache:
            cache = open_things.enter_context(
                CacheOfRun(model_args, data_args, training_args, finetuning_args, kwargs)
            )

        student_rows = head_rows(kwargs["model"])
        make_online: Any = None
        rows: list[int] = []
        if of_server is not None:
            rows = [of_server.vocab_size(kwargs["tokenizer"])]
        elif cache is None or cache.needs_model:
            make_online, rows = online_teacher(
                model_args, training_args, finetuning_args, kwargs["model"], used_ids(kwargs["tokenizer"])
            )

        teachers_rows = (cache.vocab_sizes if cache is not None else None) or rows
        vocab_size, explanation = common_vocabulary(kwargs["tokenizer"], student_rows, *teachers_rows)
        if explanation:
            logging.get_logger(__name__).warning(explanation)

        def make_teacher(accelerator: Any) -> TeacherSource:
            if of_server is not None:
                return of_server.make_teacher(accelerator, kwargs["tokenizer"])
            return cache.make_teacher(make_online, accelerator) if cache is not None else make_online(accelerator)

        template = kwargs["data_collator"].template
        trainer = SekdTrainer(
            make_teacher=make_teacher,
            make_own_samples=own_samples_of(
                data_args, training_args, finetuning_args, generating_args, template, kwargs["tokenizer"]
            ),
            distillation=finetuning_args,
            vocab_size=vocab_size,
            teacher_fingerprint=fingerprint,
            **kwargs,
        )
        if cache is not None:
            cache.attach(trainer)
        if of_server is not None:
            of_server.attach(trainer)
        if isinstance(trainer.teacher, SeveralTeachers):
            trainer.data_collator = NumberCollator(trainer.data_collator)

        opening.extend(print_opening(model_args, finetuning_args, trainer))
        return trainer

    workflow.CustomSeq2SeqTrainer = build
    try:
        with ExitStack() as open_things:
            yield opening
    finally:
        workflow.CustomSeq2SeqTrainer = host_trainer


@contextmanager
def _empty_dataset_explained(data_args: Any) -> Iterator[None]:
    """`datasets` says of a file without records that an instruction "corresponds to no data"."""
    try:
        yield
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise

        names = ", ".join([*(data_args.dataset or []), *(data_args.eval_dataset or [])])
        raise DataError(
            f"one of the data sets {names} holds no record: look at its file in "
            f"`dataset_dir: {data_args.dataset_dir}`."
        ) from error
