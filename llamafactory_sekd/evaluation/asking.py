"""What a system is asked for each sentence: its prompt, and the examples before it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.testsets import TestSet, load_test_set
from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.evaluation_settings import Examples, System
from llamafactory_sekd.evaluation.translator import Request


# chrF2, as sacrebleu has it: n-grams of up to six characters, recall counted four times.
_ORDER = 6
_BETA_SQUARED = 4


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
    pool = _pool(system.examples.origin, task_dir, direction)
    chosen = _choose(system.examples, pool, texts)
    return [
        replace(request, examples=tuple((system.prompt.user_message(s, direction), t) for s, t in shots))
        for request, shots in zip(plain, chosen, strict=True)
    ]


@dataclass(frozen=True)
class _Pool:
    """Translations to choose from."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]


def _pool(origin: str, task_dir: Path, direction: Direction) -> _Pool:
    folder = Path(origin)
    task, place = (folder.name, folder.parent) if folder.is_dir() else (origin, task_dir)
    found = load_test_set(task, place, direction)
    return _Pool(found.sources, found.references)


def _choose(examples: Examples, pool: _Pool, texts: Sequence[Sequence[str]]) -> Iterator[list[tuple[str, str]]]:
    """Yield the examples of each text, the nearest last; a sentence is never its own example."""
    nearest = Nearest(pool.sources) if examples.nearest else None
    for lines in texts:
        own = set(map(same_text, lines))
        order = nearest.order(" ".join(lines)) if nearest is not None else range(len(pool.sources))
        kept = [index for index in order if same_text(pool.sources[index]) not in own][: examples.number]
        if len(kept) < examples.number:
            raise EvaluationError(
                f"`examples`: {examples.origin} has {len(kept)} other sentences, and {examples.number} are asked for."
            )
        yield [(pool.sources[index], pool.targets[index]) for index in reversed(kept)]


@cache
def same_text(text: str) -> str:
    """Return what two texts have in common that differ in case and white space alone."""
    return "".join(text.casefold().split())


class Nearest:
    """Sentences by their sentence-level chrF2 to another one; the figures are sacrebleu's."""

    def __init__(self, sentences: Sequence[str]) -> None:
        places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._totals = np.zeros((_ORDER, len(sentences)))
        for index, sentence in enumerate(sentences):
            for gram, count in _ngrams(sentence).items():
                places[gram].append((index, count))
                self._totals[len(gram) - 1, index] += count
        self._places = {gram: np.array(found).T for gram, found in places.items()}

    def scores(self, sentence: str) -> np.ndarray:
        """Return chrF2 (0 to 1) of every sentence with ``sentence`` as the reference."""
        matches = np.zeros_like(self._totals)
        own = np.zeros((_ORDER, 1))
        for gram, count in _ngrams(sentence).items():
            own[len(gram) - 1] += count
            if gram in self._places:
                indices, counts = self._places[gram]
                matches[len(gram) - 1, indices] += np.minimum(counts, count)
        used = (self._totals > 0) & (own > 0)
        orders = np.maximum(used.sum(axis=0), 1)
        precision = (matches / np.maximum(self._totals, 1) * used).sum(axis=0) / orders
        recall = (matches / np.maximum(own, 1) * used).sum(axis=0) / orders
        below = _BETA_SQUARED * precision + recall
        return (1 + _BETA_SQUARED) * precision * recall / np.where(below > 0, below, 1)

    def order(self, sentence: str) -> list[int]:
        """Return the places of the sentences, the nearest first; ties in their order."""
        return np.argsort(-self.scores(sentence), kind="stable").tolist()


def _ngrams(sentence: str) -> Counter[str]:
    text = "".join(sentence.split())
    return Counter(
        text[start : start + size] for size in range(1, _ORDER + 1) for start in range(len(text) - size + 1)
    )
