"""The candidates of each sentence: what `sekd translate` is asked for, and what a model makes of it.

Translations are kept as they are finished: what a killed run, or a part of many, leaves behind. The folder outlives
the run: another choice among the candidates, or another filter, needs no model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llamafactory_sekd.errors import ArgumentError, EvaluationError
from llamafactory_sekd.evaluation.decoding import Candidates, Drawing, SeededPrompt
from llamafactory_sekd.evaluation.evaluation_settings import Decoding
from llamafactory_sekd.evaluation.systems import BatchLimits, Translation
from llamafactory_sekd.evaluation.translation_store import Record, Store
from llamafactory_sekd.files import locked
from llamafactory_sekd.fingerprints import sha256
from llamafactory_sekd.ranks import Ranks
from llamafactory_sekd.translation.choosing import Choice


logger = logging.getLogger(__name__)

METHODS = ("greedy", "beam", "sample", "mbr")
_BEAMS, _SAMPLES = 4, 16


@dataclass(frozen=True)
class Plan:
    """How translations are made and chosen: ``count`` candidates a sentence, samples where there is a ``drawing``."""

    method: str
    decoding: Decoding
    count: int
    drawing: Drawing | None
    choice: Choice


def make_plan(
    method: str,
    *,
    samples: int | None,
    beams: int | None,
    n_best: int,
    metric: str | None,
    keep: str | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    max_new_tokens: int,
    length_penalty: float,
    backend: str,
) -> Plan:
    """Check the options that decide what is made; raises :class:`ArgumentError` for the first that cannot work."""
    if method not in METHODS:
        raise ArgumentError(f"`--method {method}`: use one of {', '.join(METHODS)}.")
    draws = method in ("sample", "mbr")
    needs: dict[str, tuple[Any, str]] = {
        "temperature": (temperature, "sample or mbr"),
        "top-p": (top_p, "sample or mbr"),
        "top-k": (top_k, "sample or mbr"),
        "samples": (samples, "sample or mbr"),
        "beams": (beams, "beam"),
        "length-penalty": (None if length_penalty == 1.0 else length_penalty, "beam"),
        "metric": (metric, "mbr"),
    }
    for option, (value, methods) in needs.items():
        if value is not None and method not in methods.split(" or "):
            raise ArgumentError(f"`--{option}` has no effect on `--method {method}`: use {methods}, or remove it.")
    if metric not in (None, "chrf", "comet"):
        raise ArgumentError(f"`--metric {metric}`: use chrf or comet.")
    if keep not in (None, "reference"):
        raise ArgumentError(f"`--keep {keep}`: use reference, the translation closest to the reference by chrF.")
    if backend not in ("hf", "vllm"):
        raise ArgumentError(f"`--backend {backend}`: use hf or vllm.")
    if backend == "vllm" and method == "beam":
        raise ArgumentError("`--backend vllm` knows no beam search here: use hf, or another method.")
    drawing = _drawing(temperature, top_p, top_k) if draws else None
    count, width = _counts(method, samples, beams, n_best, keep is not None)
    keys = {"num_beams": width, "max_new_tokens": max_new_tokens, "length_penalty": length_penalty}
    decoding = Decoding.model_validate({"backend": backend, **keys})
    choice = Choice((metric or "chrf") if method == "mbr" else None, keep is not None, n_best)
    return Plan(method, decoding, count, drawing, choice)


def _counts(method: str, samples: int | None, beams: int | None, n_best: int, keeps: bool) -> tuple[int, int]:
    """Return how many candidates a sentence gets, and the width of the beam."""
    width = (beams or _BEAMS) if method == "beam" else 1
    if method == "beam":
        count = width if keeps else n_best
    elif method == "greedy":
        count = 1
    else:
        count = samples or (_SAMPLES if method == "mbr" or keeps else n_best)
    most = width if method == "beam" else count
    if n_best > most:
        what = {"beam": f"--beams {width}", "greedy": "--method greedy"}.get(method, f"--samples {count}")
        raise ArgumentError(f"`--n-best {n_best}` is more than `{what}` gives: raise that, or lower it.")
    if count == 1 and (keeps or method == "mbr"):
        raise ArgumentError("Nothing can be chosen among one candidate: raise `--samples` or use `--method beam`.")
    return count, width


def _drawing(temperature: float | None, top_p: float | None, top_k: int | None) -> Drawing:
    drawing = Drawing(1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p, top_k or 0)
    if drawing.temperature <= 0:
        raise ArgumentError(f"`--temperature {drawing.temperature}` cannot be sampled with: use a number above 0.")
    if not 0 < drawing.top_p <= 1:
        raise ArgumentError(f"`--top-p {drawing.top_p}` must be above 0 and at most 1.")
    if drawing.top_k < 0:
        raise ArgumentError(f"`--top-k {drawing.top_k}` must be at least 0, which keeps all tokens.")
    return drawing


def parse_shard(text: str | None) -> Shard:
    """Read ``3/8``; raises :class:`ArgumentError`."""
    if text is None:
        return Shard()
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ArgumentError(f"`--shard {text}`: write which of how many, such as 1/8 to 8/8.")
    return Shard(int(match[1]), int(match[2]))


def check_name(name: str) -> None:
    """Refuse a name of a data set that cannot be a file's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ArgumentError(f"--name {name!r} must consist of letters, digits, '-' and '_'.")


def work_folder(out: Path | None, name: str | None, work: Path | None) -> Path | None:
    """Return where candidates are kept; None where nothing says it."""
    if work is not None or out is None:
        return work
    return out / f"{name}.work" if name is not None else out.with_name(f"{out.name}.work")


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


def collect(generation: Generation, shards: int, folder: Path) -> list[list[Translation]]:
    """Return the candidates of every message, put together from all shards and checked to be of this request.

    Raises:
        EvaluationError: a shard is missing, or was made of something else.
    """
    found: dict[int, list[Translation]] = {}
    missing = []
    for number in range(1, shards + 1):
        shard = Shard(number, shards)
        places = shard.places(len(generation.messages))
        done = Store(folder, str(shard), len(places) * generation.count).finished(generation.fingerprint)
        if done is None:
            missing.append(number)
            continue
        made = [Translation(text, 0, hit) for text, hit in zip(done.lines, done.hit_limit or [], strict=True)]
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
        SeededPrompt(prompts[unit // count], generation.seed_of(places[unit // count], unit % count)) for unit in mine
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
