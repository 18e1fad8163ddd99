"""What there is to do for each model of a study, what of it is done, and what has to be done again.

A job's folder holds ``train.yaml``, ``eval.yaml``, the host's outputs, and ``cell.json``, which says what the folder
was made of. What the host leaves behind shows how far a job is, so commands that were run elsewhere count as well.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.data.testsets import TestSet, load_test_set
from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.files import read_json, write_json
from llamafactory_sekd.evaluation.fingerprint import Digests
from llamafactory_sekd.evaluation.workspace import check_workspace
from llamafactory_sekd.study import evaluation, ingredients
from llamafactory_sekd.study.files import write_yaml
from llamafactory_sekd.study.matrix import Cell, slug
from llamafactory_sekd.study.spec import Spec


@dataclass(frozen=True)
class Job:
    """A model to train and to evaluate, or, without a ``cell``, only to evaluate.

    ``model`` is its entry in eval.yaml, ``evaluation`` the keys that all of the study's evaluations share,
    ``made_of`` the ingredients, null where nothing is trained.
    """

    id: str
    folder: Path
    model: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    made_of: Mapping[str, Any]
    cell: Cell | None = None

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    @property
    def eval_folder(self) -> Path:
        return self.folder / "eval"

    @property
    def train_yaml(self) -> Path:
        return self.folder / "train.yaml"

    @property
    def eval_yaml(self) -> Path:
        return self.folder / "eval.yaml"

    @property
    def record(self) -> Path:
        return self.folder / "cell.json"


def list_jobs(spec: Spec, cells: list[Cell], config: Mapping[str, Any], test_sets: Mapping[str, TestSet]) -> list[Job]:
    """Return all jobs, the models that are only evaluated first. Reads models and data that changed since last time.

    Args:
        spec: the study.
        cells: its cells.
        config: the keys of the evaluation.
        test_sets: per direction.
    """
    digests = Digests(spec.output_dir / ".digests.json")
    jobs = []
    for name, model in spec.models.items():
        made_of = {"training": None, "evaluation": ingredients.of_evaluation(config, model, test_sets, digests)}
        jobs.append(Job(name, spec.output_dir / "models" / slug(name), model, config, made_of))
    for cell in cells:
        model = evaluation.model_of(cell)
        made_of = {
            "training": ingredients.of_training(cell.source, spec.teacher_cache, digests),
            "evaluation": ingredients.of_evaluation(config, model, test_sets, None),
        }
        jobs.append(Job(cell.id, cell.folder, model, config, made_of, cell))
    return jobs


def load_test_sets(config: Mapping[str, Any]) -> dict[str, TestSet]:
    """Return the evaluation's test sets by direction; :class:`DataError` or :class:`EvaluationError` without them."""
    settings = evaluation.settings(config, {"model_name_or_path": "-"}, Path("-"))
    return {str(d): load_test_set(settings.task, settings.task_dir, str(d)) for d in settings.directions}


def is_trained(job: Job) -> bool:
    """Return whether the host finished the training: the model is saved, then these two files are written."""
    written = (job.model_folder / "train_results.json", job.model_folder / "trainer_state.json")
    return job.cell is None or all(path.is_file() for path in written)


def is_evaluated(job: Job) -> bool:
    return (job.eval_folder / "results.json").is_file()


def is_done(job: Job) -> bool:
    return changed(job) is None and job.record.is_file() and is_trained(job) and is_evaluated(job)


def changed(job: Job) -> str | None:
    """Return what differs from what the job's folder was made of, in words; None where nothing does."""
    before = (read_json(job.record) or {}).get("made_of")
    return ingredients.difference(before, job.made_of) if before is not None else None


def make_ready(job: Job, test_sets: Mapping[str, TestSet]) -> None:
    """Write the job's files. What was made of something else is removed, and the rest is there to be continued."""
    before = (read_json(job.record) or {}).get("made_of") or {}
    if ingredients.difference(before.get("training"), job.made_of["training"]) is not None or not before:
        shutil.rmtree(job.folder, ignore_errors=True)
    elif ingredients.difference(before.get("evaluation"), job.made_of["evaluation"]) is not None:
        (job.eval_folder / "results.json").unlink(missing_ok=True)
        _make_room(job, test_sets)

    if job.cell is not None:
        write_yaml(job.train_yaml, dict(job.cell.config), f"llamafactory-cli train {job.train_yaml}")
    config = evaluation.eval_yaml(job.evaluation, job.model, job.eval_folder)
    write_yaml(job.eval_yaml, config, f"llamafactory-cli eval {job.eval_yaml}")
    mark_resumed(job, was_resumed(job))


def was_resumed(job: Job) -> bool:
    return bool((read_json(job.record) or {}).get("resumed"))


def mark_resumed(job: Job, resumed: bool) -> None:
    write_json(job.record, {"id": job.id, "resumed": resumed, "made_of": job.made_of})


def _make_room(job: Job, test_sets: Mapping[str, TestSet]) -> None:
    """Remove an evaluation that this one cannot continue: other decoding, another template, other test sets."""
    settings = evaluation.settings(job.evaluation, job.model, job.eval_folder)
    try:
        check_workspace(settings, {direction: test_set.fingerprint for direction, test_set in test_sets.items()})
    except EvaluationError:
        shutil.rmtree(job.eval_folder)
