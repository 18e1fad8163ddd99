"""What the evaluation needs from the framework that loads the models, as plain callables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llamafactory_sekd.evaluation.evaluation_settings import System


@dataclass(frozen=True)
class Request:
    """What a model is asked: the user's message, and earlier exchanges (message, answer) that show how it is done."""

    message: str
    examples: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Translation:
    """One translation: its text, its number of generated tokens, and whether the limit cut it off.

    A model's text is as it was written, line breaks and all; what is kept is a single line.
    """

    text: str
    tokens: int
    hit_limit: bool


@dataclass(frozen=True)
class BatchLimits:
    """How much may be decoded at a time: tokens of prompt and output over all beams, and sentences."""

    tokens: int
    sentences: int | None = None


# Prompts and limits in; groups of (index into the prompts, translation) out, as they are finished.
Translate = Callable[[Sequence[list[int]], BatchLimits], Iterator[list[tuple[int, Translation]]]]


@dataclass(frozen=True)
class Translator:
    """A loaded model; ``encode`` turns a request into the token ids of the entire prompt."""

    encode: Callable[[Request], list[int]]
    translate: Translate


@dataclass(frozen=True)
class ModelSource:
    """Where weights come from: a directory, or a repository of the hub at ``revision``.

    ``config`` names the file that every such repository has (``config.json``, ``adapter_config.json``).
    """

    location: str
    revision: str | None = None
    config: str = "config.json"


@dataclass(frozen=True)
class Description:
    """What the framework makes of a system's arguments: its weights (base model, then adapters) and its template.

    ``thought_words`` open and close the thoughts that a model of that template may write before its answer; None
    where they are the usual ones.
    """

    sources: tuple[ModelSource, ...]
    template: str
    thought_words: tuple[str, str] | None = None


@dataclass(frozen=True)
class Host:
    """The framework.

    ``describe`` raises :class:`EvaluationError` when a system's arguments cannot work and loads nothing; ``load``
    loads the model, which is freed when nobody holds the :class:`Translator` any more. ``versions`` are those of the
    packages that can change an output.
    """

    describe: Callable[[System], Description]
    load: Callable[[System], Translator]
    versions: dict[str, str]
