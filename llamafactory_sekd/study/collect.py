"""Reads what the host's commands left in the jobs' folders and puts the study's results together."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.evaluation.scores import mean, segment_file, segment_key, similarity
from llamafactory_sekd.evaluation.translation_store import read_hypotheses
from llamafactory_sekd.files import read_json
from llamafactory_sekd.study.evaluation import SYSTEM, VALIDATION, Evaluation, metric_models
from llamafactory_sekd.study.jobs import Job, changed, is_evaluated, is_trained, was_resumed
from llamafactory_sekd.study.matrix import Cell
from llamafactory_sekd.study.spec import Spec
from llamafactory_sekd.study.study_results import SCHEMA_VERSION, select


def collect(spec: Spec, jobs: list[Job], test: Evaluation | None) -> dict[str, Any]:
    """Return the contents of results.json (its schema is in :mod:`llamafactory_sekd.study.study_results`).

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
