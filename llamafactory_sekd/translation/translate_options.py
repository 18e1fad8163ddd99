"""The options of `sekd translate`, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.evaluation.candidates import Drawing
from llamafactory_sekd.evaluation.evaluation_settings import Decoding
from llamafactory_sekd.translation.generated import Shard
from llamafactory_sekd.translation.picking import Choice


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
    for option, value in (("--temperature", temperature), ("--top-p", top_p), ("--top-k", top_k)):
        if value is not None and not draws:
            raise ArgumentError(f"`{option}` has no effect on `--method {method}`: use sample or mbr, or remove it.")
    if samples is not None and not draws:
        raise ArgumentError(f"`--samples` has no effect on `--method {method}`: use sample or mbr, or remove it.")
    if beams is not None and method != "beam":
        raise ArgumentError(f"`--beams` has no effect on `--method {method}`: use beam, or remove it.")
    if length_penalty != 1.0 and method != "beam":
        raise ArgumentError(f"`--length-penalty` has no effect on `--method {method}`: use beam, or remove it.")
    if metric is not None and method != "mbr":
        raise ArgumentError(f"`--metric` has no effect on `--method {method}`: use mbr, or remove it.")
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
    decoding = Decoding(backend=backend, num_beams=width, max_new_tokens=max_new_tokens, length_penalty=length_penalty)
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
