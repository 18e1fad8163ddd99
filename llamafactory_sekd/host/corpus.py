"""What a teacher makes of text before a run: which pairs of a corpus look wrong, how hard the first examples are."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from llamafactory_sekd.arguments import AUTO, GAMMA, SELF
from llamafactory_sekd.data.checks import Pair
from llamafactory_sekd.data.languages import Direction, is_other_language
from llamafactory_sekd.data.prompts import PARROT, PLAIN
from llamafactory_sekd.errors import ArgumentError, DataError
from llamafactory_sekd.files import read_json, write_atomic, write_json
from llamafactory_sekd.fingerprints import xxh3_of_json
from llamafactory_sekd.host.cached_teacher import weights_of
from llamafactory_sekd.host.templates import check_template
from llamafactory_sekd.teacher.cache.segments import Segment, segments
from llamafactory_sekd.teacher.doubts import DOUBTED, Verdict, judge


# Pairs that a report lists.
_SHOWN = 10
# What docs/choose.md calls many: from here on its table gives other advice.
MANY_DOUBTED, NEARLY_ALL_HARD, HARDLY_ANY_HARD = 0.2, 0.98, 0.02
# Below this geometric mean of its tokens' probabilities a reference is one that the teacher doubts. What it finds on
# noise that was made is in docs/data.md.
DOUBT = 0.005
# How many times longer or shorter than usual a translation is, and from how many characters on that means something.
LENGTH_FACTOR, LONG_ENOUGH = 2.5, 10
REASONS = {
    "doubted": "the teacher doubts the reference",
    "copied": "both sides are the same",
    "length": "the length is unusual for the source",
    "language": "not the target language",
}
COLUMNS = ("reasons", "probability", "file", "line", "source", "target")
# Pairs between two times that what is known is written down.
_WRITE_EVERY = 2000


@dataclass(frozen=True)
class Judged:
    """A pair, the geometric mean of the teacher's probabilities of its reference's tokens, and what is suspicious."""

    pair: Pair
    probability: float
    reasons: tuple[str, ...]


def check_corpus(
    pairs: Sequence[Pair],
    direction: Direction,
    probabilities: Sequence[float],
    doubt: float = DOUBT,
) -> list[Judged]:
    """Return every pair with what is suspicious about it, in order.

    Args:
        pairs: the corpus.
        direction: tells the target language.
        probabilities: from :func:`read_with`.
        doubt: the probability below which the teacher doubts a reference.
    """
    ratios = [len(pair.target) / len(pair.source) for pair in pairs if len(pair.source) >= LONG_ENOUGH]
    usual = median(ratios) if ratios else 1.0
    language = direction.target
    return [
        Judged(pair, probability, tuple(_reasons(pair, probability, usual, language, doubt)))
        for pair, probability in zip(pairs, probabilities, strict=True)
    ]


def _reasons(pair: Pair, probability: float, usual: float, language: str, doubt: float) -> list[str]:
    ratio = len(pair.target) / len(pair.source) / usual
    long_enough = len(pair.source) >= LONG_ENOUGH
    found = {
        "doubted": probability < doubt,
        "copied": pair.source.casefold() == pair.target.casefold(),
        "length": long_enough and not 1 / LENGTH_FACTOR <= ratio <= LENGTH_FACTOR,
        "language": is_other_language(pair.target, language),
    }
    return [name for name, is_so in found.items() if is_so]


def read_with(
    teacher: str,
    template: str,
    pairs: Sequence[Pair],
    direction: Direction,
    *,
    batch_size: int,
    memory: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Let a teacher read every reference after its prompt and return the geometric means of its probabilities.

    Args:
        teacher: a path or hub id.
        template: the host's template, `parrot` for Parrot's prompt.
        pairs: the corpus.
        direction: for the prompt.
        batch_size: pairs in a forward pass.
        memory: a file of what was read before; an interrupted run goes on from it.
        progress: called with the number of pairs that are known.

    Raises:
        ArgumentError: the template is unknown, or the host refuses the model.
        DataError: the file is of another teacher, template or corpus.
    """
    reader = _Reader.of(teacher, template, direction)
    identity = {
        "teacher": f"{teacher} {weights_of(teacher)}",
        "template": template,
        "corpus": xxh3_of_json(_texts(pairs)),
    }
    known = _remembered(memory, identity)
    progress(len(known))
    while len(known) < len(pairs):
        part = pairs[len(known) : len(known) + _WRITE_EVERY]
        known += [verdict.probability for verdict in reader.judge(part, batch_size, progress)]
        write_json(memory, {**identity, "probabilities": known})
    return known


def _texts(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in pairs]


def _remembered(memory: Path, identity: dict[str, str]) -> list[float]:
    before = read_json(memory)
    if not isinstance(before, dict):
        return []
    differing = next((key for key, value in identity.items() if before.get(key) != value), None)
    if differing is not None:
        raise DataError(f"{memory} is of another {differing}: delete it, or choose another --out.")
    return list(before["probabilities"])


@dataclass(frozen=True)
class _Reader:
    """A loaded teacher with its tokenizer and template."""

    teacher: Any
    tokenizer: Any
    template: Any
    direction: Direction
    device: Any
    is_parrot: bool

    @classmethod
    def of(cls, name: str, template: str, direction: Direction) -> _Reader:
        from accelerate import Accelerator
        from llamafactory.data import get_template_and_fix_tokenizer
        from llamafactory.hparams import get_infer_args
        from llamafactory.model import load_model, load_tokenizer

        from llamafactory_sekd.teacher import Teacher

        check_template("--template", template)
        try:
            model_args, data_args, finetuning_args, _ = get_infer_args(
                {"model_name_or_path": name, "template": template}
            )
            tokenizer = load_tokenizer(model_args)["tokenizer"]
            built = get_template_and_fix_tokenizer(tokenizer, data_args)
            model = load_model(tokenizer, model_args, finetuning_args, is_trainable=False)
        except (OSError, ValueError) as error:
            raise ArgumentError(f"`--teacher {name}` cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        accelerator = Accelerator()
        loaded = Teacher(model, accelerator)
        return cls(loaded, tokenizer, built, direction, accelerator.device, template == "parrot")

    def judge(self, pairs: Sequence[Pair], batch_size: int, progress: Callable[[int], None]) -> list[Verdict]:
        examples = [self._example(pair) for pair in pairs]
        return judge(examples, self.teacher, batch_size=batch_size, device=self.device, progress=progress)

    def _example(self, pair: Pair) -> Segment:
        prompt = PARROT if self.is_parrot else PLAIN
        turns = [
            {"role": "user", "content": prompt.user_message(pair.source, self.direction)},
            {"role": "assistant", "content": pair.target},
        ]
        before, response = self.template.encode_oneturn(self.tokenizer, turns)
        ids = np.array([*before, *response], dtype=np.int32)
        rows = np.zeros(len(ids), dtype=bool)
        rows[len(before) - 1 : -1] = True
        return Segment(ids, rows, None)


def write_suspects(path: Path, judged: Sequence[Judged]) -> int:
    """Write the suspicious pairs, the most doubted first, as a TSV file with a header; return how many they are."""
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\", lineterminator="\n")
    writer.writerow(COLUMNS)
    suspects = sorted((one for one in judged if one.reasons), key=lambda one: one.probability)
    for one in suspects:
        pair = one.pair
        writer.writerow(
            [",".join(one.reasons), f"{one.probability:.3g}", pair.file, pair.line, *map(_flat, _texts([pair])[0])]
        )
    write_atomic(path, stream.getvalue())
    return len(suspects)


def write_kept(path: Path, judged: Sequence[Judged]) -> int:
    """Write the other pairs as TSV for ``sekd data pairs --tsv``; return how many they are."""
    kept = [one.pair for one in judged if not one.reasons]
    write_atomic(path, "".join(f"{_flat(pair.source)}\t{_flat(pair.target)}\n" for pair in kept))
    return len(kept)


def _flat(text: str) -> str:
    """Return a sentence without tabs, which separate columns."""
    return text.replace("\t", " ")


def doubted_lines(pairs: list[tuple[float, str, str]]) -> list[str]:
    """Return the most doubted pairs, one a line: the teacher's probability, source, reference."""
    most = sorted(pairs)[:_SHOWN]
    return ["Most doubted:", *(f"  {probability:8.2g}  {source}  →  {target}" for probability, source, target in most)]


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
    with redirect_stdout(io.StringIO()):  # the host prints its first example
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
    return Sample(verdicts, [_prompt_and_reference(data.tokenizer, example) for example in found], gamma)


def _examples(datasets: Sequence[Any]) -> Iterator[Segment]:
    for example in datasets[0]:
        yield from segments(example)


def _prompt_and_reference(tokenizer: Any, example: Segment) -> tuple[str, str]:
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
