"""The stage: the host's own SFT workflow with our trainer in place of the host's, and what it says at its start."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory_sekd.argument_checks import idle_keys
from llamafactory_sekd.arguments import SELF, STAGE, DistillationArguments, keys_read_by
from llamafactory_sekd.data.products import record_training_text
from llamafactory_sekd.errors import DataError, HostError
from llamafactory_sekd.evaluation.model_card import write_training
from llamafactory_sekd.host.run_arguments import HostArguments
from llamafactory_sekd.host.run_names import check_names, check_output, check_student
from llamafactory_sekd.host.run_progress import LOADING, LOADING_STEPS, Phases, phases_of
from llamafactory_sekd.host.served_teacher import ServerOfRun, connect
from llamafactory_sekd.host.teacher_loading import (
    check_fit,
    check_same_teacher,
    head_rows,
    online_teacher,
    teacher_fingerprint,
    teacher_identity,
)
from llamafactory_sekd.host.tokenizing import counting_cut_text, numbered_examples
from llamafactory_sekd.presets import PRESETS, preset_of


if TYPE_CHECKING:
    from llamafactory_sekd.trainer.on_policy import OwnSamples, Search
    from llamafactory_sekd.trainer.sampling import RowDraws, Sampling


_SIGNS = {"kd_lambda": "λ", "kd_beta": "β", "kd_gamma": "Γ", "kd_topk": "hard share", "kd_hard_scale": "hard scale"}


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
        def host_run() -> None:
            host_run_sft(model_args, data_args, training_args, finetuning_args, generating_args, callbacks)

        if getattr(finetuning_args, "use_sekd", False):
            _run_sekd(HostArguments(model_args, data_args, training_args, finetuning_args, generating_args), host_run)
        else:
            host_run()

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


def _run_sekd(run: HostArguments, host_run: Callable[[], None]) -> None:
    training, finetuning = run.training, run.finetuning
    if not training.do_train and not training.do_eval:  # prediction alone is the host's
        host_run()
        return

    check_names(run)
    check_student(run)
    if run.is_first_rank:
        check_output(training.output_dir)
    if finetuning.teacher_model:
        check_fit(run)

    of_server = None
    if finetuning.teacher_server:
        of_server = ServerOfRun(connect(run, hidden=finetuning.teacher_server_topk is None), run)
    fingerprint = of_server.fingerprint if of_server else teacher_fingerprint(run)
    check_same_teacher(run, fingerprint)
    with (
        numbered_examples(finetuning),
        counting_cut_text(finetuning.kd_max_cut, print if run.is_first_rank else None),
        closing(of_server) if of_server else nullcontext(),
        phases_of(run) as phases,
        _our_trainer(run, fingerprint, of_server, phases) as opening,
        _unusable_dataset_explained(run.data),
    ):
        host_run()

    if training.do_train and training.should_save:
        _record_training(run, opening)


def _record_training(run: HostArguments, opening: list[str]) -> None:
    """Write next to the trained model what it was trained on, on which objective, and how that went."""
    output, data = Path(run.training.output_dir), run.data
    if isinstance(data.dataset_dir, str):
        record_training_text(output, Path(data.dataset_dir), list(data.dataset or []))
    if opening:  # the host has just written the card; it names neither teacher nor objective
        write_training(output / "README.md", opening, data.dataset or [])
    if run.finetuning.plot_loss:
        from llamafactory_sekd.trainer import plot_distillation

        figure = plot_distillation(run.training.output_dir)
        if figure is not None:
            print("Figure saved at:", figure)


@contextmanager
def _our_trainer(
    run: HostArguments, fingerprint: str | None, of_server: ServerOfRun | None, phases: Phases
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
        if kwargs["finetuning_args"] is not run.finetuning:  # of another run of this process, while ours goes on
            return host_trainer(**kwargs)

        phases.note(LOADING, 1, LOADING_STEPS)
        cache = None
        if run.finetuning.teacher_cache:
            cache = open_things.enter_context(closing(CacheOfRun(run, kwargs)))

        student_rows = head_rows(kwargs["model"])
        make_online: Any = None
        rows: list[int] = []
        if of_server is not None:
            rows = [of_server.vocab_size(kwargs["tokenizer"])]
        elif cache is None or cache.needs_model:
            make_online, rows = online_teacher(run, kwargs["model"], used_ids(kwargs["tokenizer"]))

        teachers_rows = (cache.vocab_sizes if cache is not None else None) or rows
        vocab_size, explanation = common_vocabulary(kwargs["tokenizer"], student_rows, *teachers_rows)
        if explanation:
            logging.get_logger(__name__).warning(explanation)

        def make_teacher(accelerator: Any) -> TeacherSource:
            if of_server is not None:
                return of_server.make_teacher(accelerator, kwargs["tokenizer"])
            return cache.make_teacher(make_online, accelerator) if cache is not None else make_online(accelerator)

        trainer = SekdTrainer(
            make_teacher=make_teacher,
            make_own_samples=own_samples_of(run, kwargs["data_collator"].template, kwargs["tokenizer"]),
            distillation=run.finetuning,
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

        phases.fills_cache = cache is not None and cache.needs_model
        phases.note(LOADING, LOADING_STEPS, LOADING_STEPS)
        trainer.add_callback(phases)
        opening.extend(print_opening(run, trainer))
        return trainer

    workflow.CustomSeq2SeqTrainer = build
    try:
        with ExitStack() as open_things:
            yield opening
    finally:
        workflow.CustomSeq2SeqTrainer = host_trainer


@contextmanager
def _unusable_dataset_explained(data_args: Any) -> Iterator[None]:
    """Say in one line what is wrong with a data set; its reader names an instruction or a bare column."""
    names = ", ".join([*(data_args.dataset or []), *(data_args.eval_dataset or [])])
    try:
        yield
    except KeyError as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not any(Path(frame.filename).match("llamafactory/data/converter.py") for frame in frames):
            raise
        raise DataError(
            f"a record of the data sets {names} has no column {error}: name the columns of its file under `columns` "
            f"in {data_args.dataset_dir}/dataset_info.json, for example `response: target`."
        ) from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise

        raise DataError(
            f"one of the data sets {names} holds no record: look at its file in "
            f"`dataset_dir: {data_args.dataset_dir}`."
        ) from error


def own_samples_of(run: HostArguments, template: Any, tokenizer: Any) -> Callable[[Any], OwnSamples] | None:
    """Return what makes the own samples of a run from the trainer's accelerator, or None where there are none."""
    if not run.finetuning.kd_on_policy:
        return None

    from llamafactory_sekd.data.languages import differs_in_language
    from llamafactory_sekd.evaluation.guards import has_loop
    from llamafactory_sekd.trainer.on_policy import OwnSamples
    from llamafactory_sekd.trainer.own_sample_logs import Look, OwnSampleLog
    from llamafactory_sekd.trainer.sampling import Sampling

    def look(sample: list[int], reference: list[int]) -> Look:
        text, expected = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (sample, reference))
        return Look(has_loop(text), differs_in_language(text, expected))

    sampling = Sampling(
        do_sample=run.generating.do_sample,
        temperature=run.generating.temperature,
        top_p=run.generating.top_p,
        top_k=run.generating.top_k,
        max_new_tokens=run.generating.max_new_tokens,
        stop_ids=tuple(template.get_stop_token_ids(tokenizer)),
        pad_id=tokenizer.pad_token_id,
    )
    every = run.finetuning.kd_on_policy_every
    return lambda accelerator: OwnSamples(
        share=run.finetuning.kd_on_policy,
        every=every,
        drop_truncated=run.finetuning.kd_on_policy_truncated == "drop",
        sampling=sampling,
        cutoff_len=run.data.cutoff_len,
        seed=run.training.seed,
        accelerator=accelerator,
        log=OwnSampleLog(
            sampling,
            every,
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
            accelerator=accelerator,
            output_dir=run.training.output_dir,
            look=look,
        ),
        search=_search(sampling),
    )


def _search(sampling: Sampling) -> Search:
    """Return the evaluation's decoder, for students that agree with it; they are asked once up to a length."""
    from llamafactory_sekd.evaluation.decoding import WayToDecode
    from llamafactory_sekd.evaluation.greedy import greedy_search
    from llamafactory_sekd.evaluation.systems import BatchLimits
    from llamafactory_sekd.trainer.on_policy import TOKENS_AT_A_TIME

    ways: list[WayToDecode] = []

    def search(
        model: Any, prompts: Sequence[list[int]], draws: RowDraws | None, longest: int
    ) -> tuple[Iterator[list[tuple[int, list[int]]]] | None, bool]:
        if not ways:
            ways.append(WayToDecode(model, sampling.pad_id, sampling.max_new_tokens, greedy=True))
        ways[0].ask(prompts)
        if not ways[0].fast:
            return None, ways[0].padded
        limits = BatchLimits(TOKENS_AT_A_TIME)
        return greedy_search(model, prompts, sampling.stop_ids, sampling.pad_id, longest, limits, draws), True

    return search


def print_opening(run: HostArguments, trainer: Any) -> list[str]:
    """Print the block on the first rank, whatever the log level: a run that does something else is seen at once.

    Returns its lines, which the model card has as well.
    """
    lines = opening_lines(run, trainer)
    if trainer.args.process_index == 0:
        print("\n".join([*lines, *idle_keys(run.finetuning)]), flush=True)
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
