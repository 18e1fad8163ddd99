"""A system: the framework that loads it, what it is asked, what decides its translations, and what it costs to keep.

The framework is handed in as plain callables (:class:`Host`); the evaluation knows none.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.testsets import TestSet, load_test_set
from llamafactory_sekd.errors import EvaluationError, one_line
from llamafactory_sekd.evaluation.evaluation_settings import Decoding, Examples, System
from llamafactory_sekd.evaluation.scores import Nearest
from llamafactory_sekd.fingerprints import Digests, sha256_of_json


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

    def in_one_line(self) -> Translation:
        """Return the translation with its text on a single line."""
        return replace(self, text=one_line(self.text))


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


@dataclass(frozen=True)
class Document:
    """Sentences that are translated together: what the model is asked, and their places in the test set."""

    request: Request
    places: tuple[int, ...]


def requests_of(system: System, direction: Direction, test_set: TestSet, task_dir: Path) -> list[Request]:
    """Return what ``system`` is asked, one request per sentence of the test set.

    Raises :class:`EvaluationError` where the examples cannot be had.
    """
    return _requests(system, direction, [(source,) for source in test_set.sources], task_dir)


def documents_of(system: System, direction: Direction, test_set: TestSet, task_dir: Path) -> list[Document]:
    """Return what ``system`` is asked for the documents of the test set; none where it reads single sentences.

    Raises :class:`EvaluationError` where the test set names no documents, or the examples cannot be had.
    """
    if not system.document:
        return []
    if not any(test_set.documents):
        raise EvaluationError(
            f"`document`: the test set {test_set.task} {direction} names no documents: put one name per line into "
            f"{direction}.docid next to its texts."
        )
    places = documents_in(test_set.documents, None if system.document is True else system.document)
    texts = [[test_set.sources[place] for place in found] for found in places]
    requests = _requests(system, direction, texts, task_dir)
    return [Document(request, found) for request, found in zip(requests, places, strict=True)]


def documents_in(names: Sequence[str], most: int | None = None) -> list[tuple[int, ...]]:
    """Return the places of the sentences of each document: neighbors of the same name, ``most`` of them at a time.

    A sentence without a name is a document of its own.
    """
    found: list[list[int]] = []
    for place, name in enumerate(names):
        joins = place > 0 and name and name == names[place - 1]
        if joins and (most is None or len(found[-1]) < most):
            found[-1].append(place)
        else:
            found.append([place])
    return [tuple(places) for places in found]


def _requests(system: System, direction: Direction, texts: Sequence[Sequence[str]], task_dir: Path) -> list[Request]:
    """Return a request for each of ``texts``, which are sentences that come in lines."""
    plain = [Request(system.prompt.user_message("\n".join(lines), direction)) for lines in texts]
    if system.examples is None:
        return plain
    folder = Path(system.examples.origin)
    task, place = (folder.name, folder.parent) if folder.is_dir() else (system.examples.origin, task_dir)
    chosen = _choose(system.examples, load_test_set(task, place, direction), texts)
    return [
        replace(request, examples=tuple((system.prompt.user_message(s, direction), t) for s, t in shots))
        for request, shots in zip(plain, chosen, strict=True)
    ]


def _choose(examples: Examples, pool: TestSet, texts: Sequence[Sequence[str]]) -> Iterator[list[tuple[str, str]]]:
    """Yield the examples of each text, the nearest last; a sentence is never its own example."""
    nearest = Nearest(pool.sources) if examples.choose == "nearest" else None
    for lines in texts:
        own = set(map(same_text, lines))
        order = nearest.order(" ".join(lines)) if nearest is not None else range(len(pool.sources))
        kept = [index for index in order if same_text(pool.sources[index]) not in own][: examples.number]
        if len(kept) < examples.number:
            raise EvaluationError(
                f"`examples`: {examples.origin} has {len(kept)} other sentences, and {examples.number} are asked for."
            )
        yield [(pool.sources[index], pool.references[index]) for index in reversed(kept)]


@cache
def same_text(text: str) -> str:
    """Return what two texts have in common that differ in case and white space alone."""
    return "".join(text.casefold().split())


_LOCATION_KEYS = ("model_name_or_path", "adapter_name_or_path")


def source_digests(source: ModelSource, system: str, digests: Digests) -> dict[str, str]:
    """Return ``{file: SHA-256}`` of a directory's model files, or the commit of a hub repository."""
    place = locate(source, system)
    return {"hub": place} if isinstance(place, str) else digests.of_model(place)


def locate(source: ModelSource, system: str) -> Path | str:
    """Return the directory of a model, or ``repository@commit`` where it comes from the hub.

    Raises :class:`EvaluationError`, naming the ``system``, when there is no model there.
    """
    folder = Path(source.location)
    if not folder.is_dir():
        return f"{source.location}@{_hub_commit(source, system)}"
    if not (folder / source.config).is_file():
        raise EvaluationError(f"`systems.{system}`: {folder} has no {source.config}, so it holds no model.")
    return folder


def _hub_commit(source: ModelSource, system: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        config = hf_hub_download(source.location, source.config, revision=source.revision)
    except HFValidationError:
        raise EvaluationError(f"`systems.{system}`: the directory {source.location} does not exist.") from None
    except Exception as error:
        # The hub's client raises dozens of types: no network, no such repository, no permission.
        reason = str(error).strip().split("\n")[0]
        raise EvaluationError(
            f"`systems.{system}`: {source.location} is neither a directory nor available on the Hub ({reason})."
        ) from None
    return Path(config).parent.name


def system_fingerprint(
    system: System,
    description: Description,
    decoding: Decoding,
    requests: Sequence[Request],
    digests: Digests,
    versions: dict[str, str],
) -> str:
    """Return the SHA-256 of all that decides how ``system`` answers ``requests`` (prompts before the template).

    Files count by content, not by name or date, so a model may be moved or copied.
    """
    arguments = {key: value for key, value in (system.model or {}).items() if key not in _LOCATION_KEYS}
    return sha256_of_json(
        {
            "sources": [source_digests(source, system.name, digests) for source in description.sources],
            "arguments": arguments,
            "template": description.template,
            "decoding": decoding.model_dump(),
            "messages": [[one.message, *one.examples] if one.examples else one.message for one in requests],
            "versions": versions,
        }
    )


def lines_fingerprint(lines: Sequence[str]) -> str:
    """Return the fingerprint of translations that came from elsewhere."""
    return sha256_of_json({"lines": list(lines)})


_WEIGHTS = (".safetensors", ".bin", ".gguf")
# Optimizer states and the like are no part of a model.
_NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state")


@dataclass(frozen=True)
class Cost:
    """Sums over a base model and its adapters; ``parameters`` is None where the files do not tell."""

    parameters: int | None
    disk_bytes: int


def model_cost(sources: Iterable[ModelSource], system: str) -> Cost | None:
    """Return the cost of a model, by the headers of its files; None where they are not here."""
    files: list[Path] = []
    for source in sources:
        folder = locate(source, system)
        if not isinstance(folder, Path):
            return None
        files += [
            path for path in folder.iterdir() if path.suffix in _WEIGHTS and not path.name.startswith(_NO_WEIGHTS)
        ]
    known = [_parameters(path) if path.suffix == ".safetensors" else None for path in files]
    total = sum(count for count in known if count is not None) if None not in known else None
    return Cost(total, sum(path.stat().st_size for path in files)) if files else None


def _parameters(path: Path) -> int:
    """Count the numbers in a safetensors file; packed ones, of quantized models, count as what holds them."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
