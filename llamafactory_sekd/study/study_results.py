"""What a study found: ``results.json`` and ``results.csv`` below its ``output_dir``.

Schema 1 of ``results.json``; within a version keys are only ever added. Every path is relative to the folder of
``results.json``, so the folder may be moved; paths inside of ``spec`` and ``config`` are as the user wrote them.

==================================  ==================================================================================
``schema_version``, ``study``       1, and the study file's name without its suffix
``spec``                            the complete study as it ran: file, its `base`, overrides of the command line
``directions``, ``metrics``         of the evaluation, such as ``["en-de"]`` and ``["bleu", "chrf"]``
``test_set``                        ``{"task", "task_dir"}``, what ``data.testsets.load_test_set`` takes; `task_dir`
                                    is relative to the working directory; also ``bleu_tokenizer``, and (not in older
                                    files) ``metric_models``, ``{"comet": "Unbabel/wmt22-comet-da"}``; null without
                                    an evaluation
``cells[]``                         one per system, point of the matrix and seed, in the study's order
- ``id``, ``system``, ``seed``      the folder's name, the name in `systems`, the seed
- ``axes``                          ``{key: value}``; keys of the matrix that have no effect on the system are absent
- ``folder``, ``model``             paths
- ``config``                        the complete ``train.yaml``
- ``training``                      null before the training is done, else ``seconds``, ``steps``,
                                    ``samples_per_second`` (null where unknown) and ``resumed``: true where it was
                                    interrupted, and the two times are those of the last piece alone
- ``validation``                    null before; the ``eval_*`` entries of the model that was saved: the log's last, or
                                    with `load_best_model_at_end` the best; and ``nll``: ``eval_kd/ce``, or
                                    ``eval_loss`` of a system that is trained by the host's SFT; with
                                    `select.evaluation` also ``bleu``, ``chrf``, ``comet`` there, the average
- ``history``                       path of ``trainer_state.json``, whose ``log_history`` holds loss and ``kd/*``
- ``scores``                        null before the evaluation is done ({} in a study without one, once it is trained),
                                    else as in the evaluation's results.json:
                                    ``{direction or "average": {"bleu", "chrf", "comet"}}``
- ``similarity``                    ``{direction or "average": BLEU against the teacher's translations}`` or null
- ``guards``                        ``{direction: {"empty", "wrong_language", …}}``
- ``hypotheses``                    ``{direction: path}``, one translation per line
- ``segment_scores``                ``{direction: path}`` of COMET's scores (``{"scores": [...]}``), {} without COMET
``models[]``                        ``name``, ``folder``, ``scores`` to ``segment_scores`` as above; `similarity` is
                                    null for the teacher
``selection[]``                     empty without `select`, else per system and point of the other keys: ``system``,
                                    ``axes`` (without the selected key), ``key``, ``value`` (the best; null where no
                                    cell has the metric), ``metric``, ``mode`` and ``by_value``: a list of
                                    ``{"value", "mean", "seeds"}``, the metric averaged over ``seeds`` seeds
==================================  ==================================================================================
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.evaluation.evaluation_settings import METRICS
from llamafactory_sekd.evaluation.scores import mean, segment_file, segment_key, similarity
from llamafactory_sekd.evaluation.translation_store import read_hypotheses
from llamafactory_sekd.files import read_json, write_atomic
from llamafactory_sekd.study.jobs import (
    SYSTEM,
    VALIDATION,
    Evaluation,
    Job,
    changed,
    is_evaluated,
    is_trained,
    metric_models,
    was_resumed,
)
from llamafactory_sekd.study.matrix import Cell
from llamafactory_sekd.study.spec import Spec


SCHEMA_VERSION = 1
JSON, CSV = "results.json", "results.csv"


def collect(spec: Spec, jobs: list[Job], test: Evaluation | None) -> dict[str, Any]:
    """Return the contents of results.json, from what the host's commands left in the jobs' folders.

    Jobs that are not done, or were done from something else, have their figures null. Without a ``test``, the scores
    of what was trained are empty.
    """
    teacher = next((job for job in jobs if job.cell is None and job.id == spec.teacher), None)
    reader = _Reader(spec.output_dir, test, teacher)
    cells = [reader.cell(job) for job in jobs if job.cell is not None]
    chosen = select(cells, spec.select.key, spec.select.metric, spec.select.mode) if spec.select is not None else []
    return {
        "schema_version": SCHEMA_VERSION,
        "study": spec.name,
        "spec": dict(spec.effective),
        "directions": list(reader.test_sets),
        "metrics": _metrics(jobs),
        "test_set": {
            "task": test.config["task"],
            "task_dir": test.config.get("task_dir", "data/alma"),
            "bleu_tokenizer": test.config.get("bleu_tokenizer"),
            "metric_models": metric_models(test.config),
        }
        if test is not None
        else None,
        "cells": cells,
        "models": [reader.model(job) for job in jobs if job.cell is None],
        "selection": chosen,
    }


def _metrics(jobs: list[Job]) -> list[str]:
    """Return the metrics that were computed, COMET only where it could run."""
    found: dict[str, None] = {}
    for job in jobs:
        results = read_json(job.eval_folder / "results.json") or {}
        found.update(dict.fromkeys(m for m in results.get("metrics", []) if m not in results.get("skipped", {})))
    return list(found)


class _Reader:
    """Reads jobs; paths are given relative to ``folder``."""

    def __init__(self, folder: Path, test: Evaluation | None, teacher: Job | None) -> None:
        self._folder = folder
        self._tokenizer = test.config.get("bleu_tokenizer") if test is not None else None
        self.test_sets = test.test_sets if test is not None else {}
        self._teacher = teacher

    def cell(self, job: Job) -> dict[str, Any]:
        cell = job.cell
        assert cell is not None
        trained = _is_current(job) and is_trained(job)
        history = job.model_folder / "trainer_state.json"
        return {
            "id": cell.id,
            "system": cell.system,
            "axes": dict(cell.axes),
            "seed": cell.seed,
            "folder": self._path(job.folder),
            "model": self._path(job.model_folder),
            "config": dict(cell.config),
            "training": _training(job) if trained else None,
            "validation": {**_validation(history, cell), **_translated_validation(job)} if trained else None,
            "history": self._path(history),
            **self._evaluation(job),
        }

    def model(self, job: Job) -> dict[str, Any]:
        return {"name": job.id, "folder": self._path(job.folder), **self._evaluation(job)}

    def _evaluation(self, job: Job) -> dict[str, Any]:
        current = _is_current(job)
        done = current and is_evaluated(job)
        results = read_json(job.eval_folder / "results.json") if done else None
        if results is None:
            nothing_to_do = not self.test_sets and current and is_trained(job)
            return {
                "scores": {} if nothing_to_do else None,
                "similarity": None,
                **{key: {} for key in ("guards", "hypotheses", "segment_scores")},
            }
        found = results["systems"][SYSTEM]
        folder = job.eval_folder / "segment_scores" / SYSTEM
        segments = {
            segment_key(direction, metric): folder / segment_file(direction, metric)
            for metric in results["metrics"]
            for direction in self.test_sets
        }
        return {
            "scores": found["scores"],
            "similarity": self._similarity(job),
            "guards": found["guards"],
            "hypotheses": {direction: self._path(_hypotheses(job, direction)) for direction in self.test_sets},
            "segment_scores": {key: self._path(path) for key, path in segments.items() if path.is_file()},
        }

    def _similarity(self, job: Job) -> dict[str, float | None] | None:
        """Compute BLEU against the teacher's translations as the evaluation does, once those are there."""
        teacher = self._teacher
        if teacher is None or job is teacher or not (_is_current(teacher) and is_evaluated(teacher)):
            return None
        found: dict[str, float | None] = {}
        for direction, test_set in self.test_sets.items():
            size = len(test_set.sources)
            own, reference = (read_hypotheses(_hypotheses(one, direction), size) for one in (job, teacher))
            found[direction] = similarity(own, reference, parse_direction(direction).target, self._tokenizer).value
        return {**found, "average": mean(list(found.values()))}

    def _path(self, path: Path) -> str:
        return Path(os.path.relpath(path, self._folder)).as_posix()


def _is_current(job: Job) -> bool:
    return job.record.is_file() and changed(job) is None


def _hypotheses(job: Job, direction: str) -> Path:
    return job.eval_folder / "hypotheses" / SYSTEM / f"{direction}.txt"


def _training(job: Job) -> dict[str, Any]:
    results = read_json(job.model_folder / "train_results.json") or {}
    state = read_json(job.model_folder / "trainer_state.json") or {}
    return {
        "seconds": _finite(results.get("train_runtime")),
        "steps": state.get("global_step"),
        "samples_per_second": _finite(results.get("train_samples_per_second")),
        "resumed": was_resumed(job),
    }


def _validation(history: Path, cell: Cell) -> dict[str, float | None]:
    """Return the validation metrics of the model that was saved, and the negative log-likelihood by one name.

    That is the log's last entry that has some, or with `load_best_model_at_end` the best checkpoint's.
    """
    state = read_json(history) or {}
    entries = [entry for entry in state.get("log_history", []) if any(key.startswith("eval_") for key in entry)]
    best = state.get("best_global_step") if cell.config.get("load_best_model_at_end") else None
    chosen = [entry for entry in entries if best is None or entry.get("step") == best] or entries
    entry: dict[str, Any] = chosen[-1] if chosen else {}
    metrics = {key: _finite(value) for key, value in entry.items() if key.startswith("eval_")}
    nll = metrics.get("eval_kd/ce" if cell.is_distillation else "eval_loss")
    return {**metrics, **({"nll": nll} if nll is not None else {})}


def _translated_validation(job: Job) -> dict[str, float | None]:
    """Return the scores of the validation set that `select` names, averaged over its directions; none without it."""
    if VALIDATION not in job.evaluations or not is_evaluated(job, VALIDATION):
        return {}
    results = read_json(job.folder / VALIDATION / "results.json") or {}
    return dict(results["systems"][SYSTEM]["scores"]["average"])


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def write_results(results: Mapping[str, Any], folder: Path) -> Path:
    """Write both files, each complete or not at all, and return the path of results.json."""
    write_atomic(folder / CSV, _table(results).encode("utf-8"))
    text = json.dumps(_plain(results), ensure_ascii=False, indent=1, allow_nan=False, default=str)
    write_atomic(folder / JSON, f"{text}\n".encode())
    return folder / JSON


def _plain(value: Any) -> Any:
    """Return the value with what JSON has no number for, such as Γ = inf, as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def select(cells: Iterable[Mapping[str, Any]], key: str, metric: str, mode: str) -> list[dict[str, Any]]:
    """Choose each system's best value of a matrix key by a validation metric, averaged over the seeds.

    Args:
        cells: as in results.json.
        key: a key of the matrix.
        metric: a key of ``validation``.
        mode: ``min`` or ``max``.
    """
    groups: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if key not in cell["axes"]:
            continue
        others = {name: value for name, value in cell["axes"].items() if name != key}
        name = json.dumps([cell["system"], others], default=str)
        group = groups.setdefault(name, {"system": cell["system"], "axes": others, "found": {}})
        found = group["found"].setdefault(json.dumps(cell["axes"][key]), [])
        value = (cell["validation"] or {}).get(metric)
        if value is not None:
            found.append(value)
    return [_best(group, key, metric, mode) for group in groups.values()]


def _best(group: dict[str, Any], key: str, metric: str, mode: str) -> dict[str, Any]:
    by_value = [
        {"value": json.loads(value), "mean": statistics.fmean(found) if found else None, "seeds": len(found)}
        for value, found in group["found"].items()
    ]
    known = [row for row in by_value if row["mean"] is not None]
    choose = min if mode == "min" else max
    best = choose(known, key=lambda row: row["mean"])["value"] if known else None
    return {
        **{name: group[name] for name in ("system", "axes")},
        **{"key": key, "value": best, "metric": metric, "mode": mode, "by_value": by_value},
    }


def _table(results: Mapping[str, Any]) -> str:
    """Return the flat table: one row per cell, one column per figure."""
    rows = [dict(_flat(cell, results)) for cell in results["cells"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _flat(cell: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((name, cell[name]) for name in ("id", "system", "seed"))
    for key in results["spec"].get("matrix") or {}:
        yield key, cell["axes"].get(key)
    for name in ("seconds", "steps", "samples_per_second"):
        yield name, (cell["training"] or {}).get(name)
    for name, value in (cell["validation"] or {}).items():
        yield (f"validation {name}" if name in METRICS else name), value
    for column in (*results["directions"], "average"):
        for metric in results["metrics"]:
            yield f"{column} {metric}", ((cell["scores"] or {}).get(column) or {}).get(metric)
        yield f"{column} similarity", (cell["similarity"] or {}).get(column)
