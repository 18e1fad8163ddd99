"""Building a teacher's cache from the host's data sets, also with prompts of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llamafactory_sekd.arguments import STAGE
from llamafactory_sekd.errors import ArgumentError, TeacherError
from llamafactory_sekd.host.cached_teacher import PROMPTS, autocast_type, fingerprints_of
from llamafactory_sekd.host.run_arguments import HostArguments, names_of_data_sets
from llamafactory_sekd.host.run_names import check_names
from llamafactory_sekd.host.teacher_loading import check_fit, teacher_model_arguments
from llamafactory_sekd.host.templates import templates_restored
from llamafactory_sekd.host.tokenizing import counting_cut_text
from llamafactory_sekd.teacher import Teacher, used_ids
from llamafactory_sekd.teacher.cache.cache_manifest import Fingerprints, Manifest, Settings
from llamafactory_sekd.teacher.cache.filling import Plan, Session, fill, make_plan
from llamafactory_sekd.teacher.cache.formats import Format, bytes_per_token
from llamafactory_sekd.teacher.cache.segments import check_responses


_EVALUATION = ("eval_dataset", "do_eval")
# The teacher's prompts are longer than the student's; how long they may be is checked against the teacher.
_UNCUT = 2**30
_ONLY_FOR_TRAINING = ("teacher_cache", "resume_from_checkpoint", "load_best_model_at_end", "early_stopping_steps")
# A cache needs a little more than its records: keys, offsets, headers.
_HEADROOM = 1.05


def build_cache(
    config: dict[str, Any],
    out: Path,
    settings: Settings,
    *,
    batch_size: int | None = None,
    prompts: TeacherPrompts | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Let the teacher of a training configuration compute what the cache lacks of its data sets.

    Args:
        config: the training YAML's keys.
        out: the cache; made where it is not there, continued where it is.
        settings: what to keep.
        batch_size: examples per forward pass and rank; None for `per_device_train_batch_size`.
        prompts: what the teacher reads in place of the student's prompts.
        say: called with lines for the user, on the first rank.

    Raises:
        ArgumentError: the configuration is not one of the stage, or names no teacher.
        TeacherError: the cache is of something else, the disk is too small, the teacher does not fit, a response of
            the teacher's own data sets differs.
    """
    data = with_prompts(config, prompts, say, tokenized, _longest) if prompts else tokenized(config, say)

    def compute(plan: Plan, session: Session, data: Tokenized) -> None:
        _compute(plan, session, data, batch_size or data.run.training.per_device_train_batch_size)

    run_session(data, out, settings, compute, lambda: _expected(settings, data), say)


def run_session(
    data: Tokenized,
    out: Path,
    settings: Settings,
    compute: Callable[[Plan, Session, Tokenized], None],
    expected: Callable[[], Manifest],
    say: Callable[[str], None],
) -> None:
    """Find out what a cache lacks and let it be computed.

    Args:
        data: the examples, and the fingerprints of the run.
        out, settings, say: see :func:`build_cache`.
        compute: takes the teacher in and writes what is missing.
        expected: the manifest of a cache that is not there yet.
    """
    session = Session(out, data.fingerprints, settings)
    try:
        with bar(sum(map(len, data.datasets)), "Examples", "ex", session.rank) as shown:
            plan = make_plan(data.datasets, session.reader, lambda count: shown.update(count) and None, data.informed)

        if session.rank == 0:
            _announce(plan, session, expected, say)

        if plan.missing or not session.head_is_intact:
            compute(plan, session, data)

        if session.rank == 0:
            session.reader.refresh()
            total, held = sum(map(len, data.datasets)), len(session.reader)
            once = f" (the data sets have {total:,}; equal ones count once)" if held < total else ""
            say(f"{out} holds {held:,} examples{once}. In the training YAML: teacher_cache: {out}")
    finally:
        session.close()


@dataclass(frozen=True)
class Tokenized:
    """A training configuration's examples, as the host makes them, and what they were made with.

    `informed` are the same data sets with the teacher's own prompts, None where it reads the student's.
    """

    datasets: list[Any]
    tokenizer: Any
    fingerprints: Fingerprints
    run: HostArguments
    informed: list[Any] | None = None


def with_prompts(
    config: dict[str, Any],
    prompts: TeacherPrompts,
    say: Callable[[str], None],
    read: Callable[[dict[str, Any], Callable[[str], None]], Tokenized],
    longest: Callable[[Tokenized], int | None],
) -> Tokenized:
    """Read the student's examples and those that the teacher reads, whose digest is part of what it is."""
    students, teachers = configurations(config, prompts)
    data = read(students, say)
    with templates_restored():
        informed = read(teachers, lambda _: None).datasets

    limit = longest(data)
    pairs = zip(data.datasets, informed, strict=True)
    digests = [check_responses(ours, theirs, data.tokenizer.decode, limit) for ours, theirs in pairs]
    teacher = data.fingerprints.teacher
    assert teacher is not None
    marked = replace(data.fingerprints, teacher=lambda: {**teacher(), PROMPTS: " ".join(digests)})
    return replace(data, fingerprints=marked, informed=informed)


def tokenized(
    config: dict[str, Any],
    say: Callable[[str], None] = print,
    *,
    check: Callable[[HostArguments], object] = check_fit,
) -> Tokenized:
    """Read the data sets of a configuration that names a teacher; see :func:`build_cache` for what it raises.

    `say` is called on the first rank with how much of them is cut, `check` with the arguments before anything is read.
    """
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.extras.misc import infer_optim_dtype
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_config, load_tokenizer

    run = HostArguments(*get_train_args(_for_building(config)))
    check_names(run)
    check(run)
    if run.model.compute_dtype is None:  # in training the student, loaded first, decides
        run.model.compute_dtype = infer_optim_dtype(getattr(load_config(run.model), "torch_dtype", None))

    tokenizer_module = load_tokenizer(run.model)
    tokenizer = tokenizer_module["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, run.data)
    with counting_cut_text(run.finetuning.kd_max_cut, say if run.is_first_rank else None):
        module = get_dataset(template, run.model, run.data, run.training, stage="sft", **tokenizer_module)
    return Tokenized(
        datasets=_datasets(module, skip_evaluation=run.training.predict_with_generate),
        tokenizer=tokenizer,
        fingerprints=fingerprints_of(tokenizer, template, run),
        run=run,
    )


@contextmanager
def filling(plan: Plan, session: Session, data: Tokenized, kept: Format) -> Iterator[dict[str, Any]]:
    """Show how far the teacher is; gives what every way to fill a cache is called with."""
    with bar(plan.tokens, "Teacher", "tok", session.rank) as shown:
        yield {
            "plan": plan,
            "datasets": data.datasets,
            "kept": kept,
            "writer": session.writer(),
            "rank": session.rank,
            "ranks": session.ranks,
            "progress": lambda count: shown.update(count) and None,
            "informed": data.informed,
        }


def _compute(plan: Plan, session: Session, data: Tokenized, batch_size: int) -> None:
    from transformers import Trainer

    from llamafactory_sekd.host.teacher_loading import load_teacher, placement_of

    # The trainer's accelerator, so that the teacher is placed and sharded as it is in training.
    accelerator = Trainer(model=torch.nn.Identity(), args=data.run.training).accelerator
    model = load_teacher(data.run)
    teacher = Teacher(model, accelerator, placement_of(data.run.finetuning))
    device = data.run.training.device
    probe = {"input_ids": torch.zeros(1, 8, dtype=torch.int64, device=device)}
    manifest = session.admit(teacher, used_ids(data.tokenizer), probe, autocast_type(accelerator))
    with filling(plan, session, data, manifest.kept()) as common:
        fill(**common, teacher=teacher, batch_size=batch_size, pad_id=data.tokenizer.pad_token_id, device=device)
    accelerator.wait_for_everyone()


def _for_building(config: dict[str, Any]) -> dict[str, Any]:
    """Return the training configuration without what only training needs; nothing is written to its output folder."""
    if config.get("stage") != STAGE:
        raise ArgumentError(
            f"`stage: {config.get('stage')}` has no teacher: give the YAML of a run with `stage: {STAGE}`."
        )
    if not config.get("teacher_model") and not config.get("teacher_server"):
        raise ArgumentError("`teacher_model` is missing: name the teacher that is to fill the cache.")
    if config.get("streaming"):
        raise ArgumentError("`streaming: true` cannot be planned ahead: set it to false to build a cache.")
    kept = {key: value for key, value in config.items() if key not in _ONLY_FOR_TRAINING}
    return {**kept, "report_to": "none", "overwrite_output_dir": True, "eval_strategy": "no", "save_strategy": "no"}


def _datasets(module: dict[str, Any], *, skip_evaluation: bool) -> list[Any]:
    found = [module["train_dataset"]] if "train_dataset" in module else []
    evaluation = module.get("eval_dataset")
    if evaluation is not None and not skip_evaluation:
        found += list(evaluation.values()) if isinstance(evaluation, dict) else [evaluation]

    return found


def _announce(plan: Plan, session: Session, expected: Callable[[], Manifest], say: Callable[[str], None]) -> None:
    """Say what is missing and how large it will be; refuse where the disk is too small."""
    if not plan.missing:
        return
    manifest = session.manifest or expected()
    per_token = bytes_per_token(manifest.kept())
    head = 0 if session.manifest else (manifest.head or {}).get("bytes", 0)
    total = int((plan.response_tokens * per_token + plan.missing * 24) * _HEADROOM) + head
    free = shutil.disk_usage(session.directory).free
    there = f" ({plan.present:,} are there already)" if plan.present else ""
    say(
        f"{plan.missing:,} examples{there} with {plan.tokens:,} tokens, {plan.response_tokens:,} in responses: "
        f"{_size(total)} ({per_token:,} bytes per response token, {manifest.format}, {manifest.dtype}); "
        f"{_size(free)} are free."
    )
    if total > free:
        raise TeacherError(
            f"the cache needs {_size(total)} and {session.directory} has {_size(free)}: choose another --out, "
            "`--dtype bfloat16`, or `--format topk`."
        )


def _expected(settings: Settings, data: Tokenized) -> Manifest:
    """Return the manifest of a cache that is not there yet, from the teacher's configuration alone."""
    config = _teacher_config(data).get_text_config()
    dtype = data.run.model.compute_dtype
    head = config.vocab_size * config.hidden_size * dtype.itemsize if settings.format == "hidden" else 0
    return settings.manifest(
        vocab_size=used_ids(data.tokenizer),
        rows=config.vocab_size,
        width=config.hidden_size,
        computed_in=dtype,
        head={"bytes": head},
    )


def _teacher_config(data: Tokenized) -> Any:
    from llamafactory.model import load_config

    return load_config(teacher_model_arguments(data.run.model, data.run.finetuning))


def _longest(data: Tokenized) -> int | None:
    return getattr(_teacher_config(data).get_text_config(), "max_position_embeddings", None)


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}"
        count /= 1024

    return f"{count:,.1f} GiB"


def bar(total: int, what: str, unit: str, rank: int) -> Any:
    """Return a progress bar, shown on the first rank."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=rank != 0)


@dataclass(frozen=True)
class TeacherPrompts:
    """What the teacher reads in place of the student's prompts; None for what stays the student's.

    Attributes:
        dataset: data sets with the student's responses and other prompts, separated by commas: one for each of
            `dataset` and, to answer them as well, of `eval_dataset`.
        template: the template of its prompts.
        system: its system prompt.
    """

    dataset: str | None = None
    template: str | None = None
    system: str | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.dataset, self.template, self.system))


def configurations(config: dict[str, Any], prompts: TeacherPrompts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configurations of the student's examples and of the teacher's.

    Evaluation sets are left out of both where `prompts.dataset` names none for them.

    Raises:
        ArgumentError: the numbers of data sets differ, or examples have no response of their own.
    """
    unpacked = "an unpacked cache serves `neat_packing` as well: add packing=false neat_packing=false"
    reasons = {"packing": unpacked, "neat_packing": unpacked, "train_on_prompt": "the prompts differ: set it to false"}
    for key, remedy in reasons.items():
        if config.get(key):
            raise ArgumentError(
                f"`{key}: {config[key]}` cannot be used with a teacher that reads other prompts; {remedy}."
            )

    training, evaluation = names_of_data_sets(config.get("dataset")), names_of_data_sets(config.get("eval_dataset"))
    asked = names_of_data_sets(prompts.dataset) if prompts.dataset is not None else training + evaluation
    if len(asked) not in (len(training), len(training) + len(evaluation)):
        wanted = f"{len(training)} for `dataset: {','.join(training)}`"
        more = f", and {len(evaluation)} more to answer `eval_dataset`" if evaluation else ""
        raise ArgumentError(
            f"`--teacher-dataset {prompts.dataset}` names {len(asked)} data sets: name {wanted}{more}."
        )
    student = dict(config)
    if len(asked) == len(training):
        student = {key: value for key, value in config.items() if key not in _EVALUATION}

    teacher = {key: value for key, value in student.items() if key != "tokenized_path"}
    teacher |= {"dataset": ",".join(asked[: len(training)]), "cutoff_len": _UNCUT}
    if len(asked) > len(training):
        teacher["eval_dataset"] = ",".join(asked[len(training) :])
    if prompts.template is not None:
        teacher["template"] = prompts.template
    if prompts.system is not None:
        teacher["default_system"] = prompts.system

    return student, teacher
