"""The translations that a model makes, kept as they are finished: what a killed run, or a part of many, leaves behind.

The folder outlives the run: another choice among the candidates, or another filter, needs no model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.candidates import Candidates, Drawing, Request
from llamafactory_sekd.evaluation.translation_store import Record, Store
from llamafactory_sekd.evaluation.translator import BatchLimits
from llamafactory_sekd.files import locked
from llamafactory_sekd.fingerprints import sha256
from llamafactory_sekd.ranks import Ranks


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of ``count``, from 1: every ``count``-th sentence, so that all parts take alike long."""

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"

    def places(self, total: int) -> list[int]:
        """Return the numbers of the sentences of this part."""
        return list(range(self.number - 1, total, self.count))


@dataclass(frozen=True)
class Made:
    """A translation, and whether the limit of tokens cut it off."""

    text: str
    hit_limit: bool


@dataclass(frozen=True)
class Generation:
    """What is asked of the model: ``messages`` to translate, ``count`` times each.

    ``identity`` condenses all else that decides the outcome: weights, template, decoding, software.
    """

    messages: Sequence[str]
    identity: str
    count: int
    drawing: Drawing | None
    seed: int

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of all that decides the translations."""
        drawing = asdict(self.drawing) | {"seed": self.seed} if self.drawing else None
        content = json.dumps([self.identity, list(self.messages), self.count, drawing], ensure_ascii=False)
        return sha256(content)

    def seed_of(self, place: int, number: int) -> int:
        """Return the seed of sample ``number`` of a sentence: the same in any shard."""
        digest = hashlib.blake2b(f"{self.seed} {place} {number}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big")


@dataclass(frozen=True)
class Model:
    """A loaded model: prompts of messages, and their translations."""

    encode: Callable[[str], list[int]]
    candidates: Candidates


def generate(
    generation: Generation, shard: Shard, folder: Path, load: Callable[[], Model], limits: BatchLimits, ranks: Ranks
) -> None:
    """Make what is missing of a shard in ``folder``; all ranks call this together.

    Raises:
        EvaluationError: another process is at work on the shard.
    """
    places = shard.places(len(generation.messages))
    store = Store(folder, str(shard), len(places) * generation.count)
    fingerprint = generation.fingerprint
    with _hold(folder, shard, ranks):
        pending = ranks.from_first(_pending(store, fingerprint, shard) if ranks.is_first else None)
        if pending is None:
            return
        if pending:
            _run(generation, places, pending, store, load(), limits, ranks)
        ranks.wait()
        if ranks.is_first:
            store.finish(fingerprint, ranks.world)


def collect(generation: Generation, shards: int, folder: Path) -> list[list[Made]]:
    """Return the candidates of every message, put together from all shards and checked to be of this request.

    Raises:
        EvaluationError: a shard is missing, or was made of something else.
    """
    found: dict[int, list[Made]] = {}
    missing = []
    for number in range(1, shards + 1):
        shard = Shard(number, shards)
        places = shard.places(len(generation.messages))
        done = Store(folder, str(shard), len(places) * generation.count).finished(generation.fingerprint)
        if done is None:
            missing.append(number)
            continue
        made = [Made(text, hit) for text, hit in zip(done.lines, done.hit_limit or [], strict=True)]
        for order, place in enumerate(places):
            found[place] = made[order * generation.count : (order + 1) * generation.count]
    if missing:
        raise EvaluationError(
            f"{folder} lacks part {', '.join(map(str, missing))} of {shards} of this request (model, text, method, "
            f"software): run it with `--shard {missing[0]}/{shards}`."
        )
    return [found[place] for place in range(len(generation.messages))]


def _hold(folder: Path, shard: Shard, ranks: Ranks) -> AbstractContextManager[None]:
    if not ranks.is_first:
        return nullcontext()
    busy = f"Another process translates part {shard.number} of {shard.count} in {folder}: wait for it to end."
    return locked(folder / f".{shard}.lock", busy, error=EvaluationError)


def _pending(store: Store, fingerprint: str, shard: Shard) -> list[int] | None:
    """Return the units that are not translated yet; None where all were before."""
    if store.finished(fingerprint) is not None:
        logger.info("Translated before, nothing has changed.")
        return None
    if store.text_path.exists():
        logger.warning("The model, the text or the method changed: translating again.")
    pending = store.resume(fingerprint)
    if len(pending) < store.size:
        logger.info("Continuing, %d of %d translations are done.", store.size - len(pending), store.size)
    return pending


def _run(
    generation: Generation,
    places: list[int],
    pending: list[int],
    store: Store,
    model: Model,
    limits: BatchLimits,
    ranks: Ranks,
) -> None:
    """Translate this rank's share of the units ``pending``: unit ``order * count + number``."""
    count = generation.count
    prompts = {
        order: model.encode(generation.messages[places[order]]) for order in {unit // count for unit in pending}
    }
    # Samples are units of their own; the translations of a beam come together.
    units = pending if generation.drawing else sorted(order * count for order in prompts)
    mine = ranks.share(sorted(units, key=lambda unit: (-len(prompts[unit // count]), unit)))
    requests = [
        Request(prompts[unit // count], generation.seed_of(places[unit // count], unit % count)) for unit in mine
    ]
    part = store.open_part(generation.fingerprint, ranks.rank)
    note = f" (rank 1 of {ranks.world})" if ranks.world > 1 else ""
    mark = time.perf_counter()
    with tqdm(total=len(mine), desc=f"Translating{note}", unit=" translations", disable=not ranks.is_first) as bar:
        for group in model.candidates(requests, limits):
            mark, started = time.perf_counter(), mark
            seconds = (mark - started) / sum(len(found) for _, found in group)
            part.append(
                Record(mine[place] + number, translation, seconds)
                for place, found in group
                for number, translation in enumerate(found)
            )
            bar.update(len(group))
