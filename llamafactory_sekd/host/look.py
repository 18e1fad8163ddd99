"""A look at a run before it starts: how hard its first examples are to the student, and which the teacher doubts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from typing import Any

import numpy as np

from llamafactory_sekd.arguments import AUTO, GAMMA, SELF
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.host.corpus import DOUBT
from llamafactory_sekd.host.data_command import doubted_lines
from llamafactory_sekd.teacher.cache.segments import Segment, segments
from llamafactory_sekd.teacher.doubts import DOUBTED, Verdict, judge


# What docs/choose.md calls many: from here on its table gives other advice.
MANY_DOUBTED, NEARLY_ALL_HARD, HARDLY_ANY_HARD = 0.2, 0.98, 0.02


@dataclass(frozen=True)
class Sample:
    """The first examples of a run, what teacher and student make of them, and (prompt, reference) of each."""

    verdicts: Sequence[Verdict]
    texts: Sequence[tuple[str, str]]
    gamma: float

    @property
    def hard(self) -> float:
        """Return the share of tokens with ``d > Γ``."""
        difficulties = [verdict.difficulty for verdict in self.verdicts if verdict.difficulty is not None]
        return float((np.concatenate(difficulties) > self.gamma).mean())

    @property
    def doubted(self) -> float:
        """Return the share of references that the teacher doubts."""
        return float(np.mean([verdict.probability < DOUBT for verdict in self.verdicts]))

    @property
    def doubted_tokens(self) -> float:
        """Return the share of tokens that the teacher doubts."""
        return float((np.concatenate([verdict.surprise for verdict in self.verdicts]) > -np.log(DOUBTED)).mean())


def look(config: dict[str, Any], count: int, progress: Callable[[int], None] = lambda _: None) -> Sample:
    """Let the teacher and the student of a training YAML read its first ``count`` examples.

    Raises:
        ArgumentError: the run is not one of the stage, or its teacher is not a model of its own.
    """
    from accelerate import Accelerator
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.model import load_model

    from llamafactory_sekd.host.cache import tokenized
    from llamafactory_sekd.host.teacher_loading import load_teacher
    from llamafactory_sekd.teacher import Teacher

    if config.get("teacher_model") == SELF:
        raise ArgumentError(
            f"`teacher_model: {SELF}` does not work with `--look`: name the teacher's folder or hub id."
        )
    if isinstance(config.get("teacher_model"), dict):
        raise ArgumentError("`teacher_model` names several teachers: `--look` takes one, with teacher_model=PATH.")
    with redirect_stdout(StringIO()):  # the host prints its first example
        data = tokenized({**config, "packing": False, "neat_packing": False}, lambda _: None)
    found = list(islice(_examples(data.datasets), count))
    accelerator = Accelerator()
    teacher = Teacher(load_teacher(data.run), accelerator)
    student = Teacher(
        load_model(data.tokenizer, data.run.model, FinetuningArguments(), is_trainable=False), accelerator
    )
    distillation = data.run.finetuning
    verdicts = judge(
        found,
        teacher,
        student,
        batch_size=data.run.training.per_device_train_batch_size,
        device=accelerator.device,
        kd_lambda=distillation.kd_lambda,
        progress=progress,
    )
    gamma = GAMMA if distillation.kd_gamma == AUTO else float(distillation.kd_gamma)
    return Sample(verdicts, [_texts(data.tokenizer, example) for example in found], gamma)


def _examples(datasets: Sequence[Any]) -> Iterator[Segment]:
    for example in datasets[0]:
        yield from segments(example)


def _texts(tokenizer: Any, example: Segment) -> tuple[str, str]:
    """Return the end of the prompt, where a sentence to translate is, and the reference."""
    first = int(np.flatnonzero(example.rows)[0]) + 1
    prompt, reference = (
        tokenizer.decode(ids, skip_special_tokens=True) for ids in (example.ids[:first], example.ids[first:])
    )
    lines = [line for line in prompt.splitlines() if line.strip() and not line.startswith("#")]
    return (lines[-1] if lines else "").strip(), reference.strip()


def report(sample: Sample) -> Iterator[str]:
    """Yield what the look found, the advice of docs/choose.md, and the most doubted pairs."""
    yield (
        f"Start: {sample.hard:.0%} of the tokens are hard (d > {sample.gamma:g}); the teacher doubts "
        f"{sample.doubted:.0%} of {len(sample.verdicts):,} references, and {sample.doubted_tokens:.0%} of the tokens "
        f"(p < {DOUBTED:g})."
    )
    yield f"Advice: {advice(sample.hard, sample.doubted)} (docs/choose.md)"
    told = zip(sample.verdicts, sample.texts, strict=True)
    yield from doubted_lines([(verdict.probability, *texts) for verdict, texts in told])


def advice(hard: float, doubted: float) -> str:
    """Return which objective to try first.

    Args:
        hard: the share of hard tokens at the start.
        doubted: the share of references that the teacher doubts.
    """
    if hard < HARDLY_ANY_HARD:
        return "hardly any token is hard: Self-Evolution is `no_evolution` here; lower `kd_gamma`, or use `auto`."
    if doubted >= MANY_DOUBTED:
        return (
            "read the pairs below and clean the corpus with `sekd data check`. Where the references are wrong and the "
            "teacher is right, try `kd_loss: forward_kl` with `kd_lambda: 1` first, then `self_evolution`."
        )
    if hard > NEARLY_ALL_HARD:
        return (
            "nearly all tokens are hard: the student is not ready for `self_evolution`; `kd_loss: forward_kl` first."
        )
    return "the references look right: try `kd_loss: forward_kl` (λ 0.5) first, and compare with your objective."
