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

from llamafactory_sekd.config import write_yaml
from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.translation_store import check_workspace
from llamafactory_sekd.files import read_json, write_json
from llamafactory_sekd.fingerprints import Digests
from llamafactory_sekd.study import ingredients
from llamafactory_sekd.study.evaluation import TEST, VALIDATION, Evaluation, eval_yaml, model_of, settings
from llamafactory_sekd.study.matrix import Cell, slug
from llamafactory_sekd.study.spec import Spec


# An evaluation's folder -> its key in `made_of`.
_RECORDED = {TEST: "evaluation", VALIDATION: "validation"}


@dataclass(frozen=True)
class Job:
    """A model to train and to evaluate, or, without a ``cell``, only to evaluate.

    ``model`` is its entry in eval.yaml, ``evaluations`` what it is evaluated on by the name of the folder below its
    own, ``made_of`` the ingredients: of the training (null where nothing is trained) and of each evaluation.
    """

    id: str
    folder: Path
    model: Mapping[str, Any]
    evaluations: Mapping[str, Evaluation]
    made_of: Mapping[str, Any]
    cell: Cell | None = None

    @property
    def model_folder(self) -> Path:
        """Return the folder of the trained model."""
        return self.folder / "model"

    @property
    def eval_folder(self) -> Path:
        """Return the folder of the evaluation on the test sets."""
        return self.folder / TEST

    @property
    def train_yaml(self) -> Path:
        """Return the path of the training YAML."""
        return self.folder / "train.yaml"

    def yaml_of(self, evaluation: str) -> Path:
        """Return the YAML file of one of the job's evaluations."""
        return self.folder / f"{evaluation}.yaml"

    @property
    def record(self) -> Path:
        """Return the path of the file that says what the folder was made of."""
        return self.folder / "cell.json"


def list_jobs(
    spec: Spec, cells: list[Cell], test: Evaluation | None, validation: Evaluation | None = None
) -> list[Job]:
    """Return all jobs, the models that are only evaluated first. Reads models and data that changed since last time.

    Args:
        spec: the study.
        cells: its cells.
        test: what every model is evaluated on; None where they are only trained.
        validation: what the cells that `select` chooses among are evaluated on as well.
    """
    digests = Digests(spec.output_dir / ".digests.json")
    tested = {TEST: test} if test is not None else {}
    jobs = []
    for name, model in spec.models.items():
        made_of = {"training": None, **_made_of(tested, model, digests)}
        jobs.append(Job(name, spec.output_dir / "models" / slug(name), model, tested, made_of))
    for cell in cells:
        model = model_of(cell)
        evaluations = dict(tested)
        if validation is not None and spec.select is not None and spec.select.key in cell.axes:
            evaluations[VALIDATION] = validation
        training = ingredients.of_training(cell.source, spec.teacher_cache, digests)
        made_of = {"training": training, **_made_of(evaluations, model, None)}
        jobs.append(Job(cell.id, cell.folder, model, evaluations, made_of, cell))
    return jobs


def _made_of(
    evaluations: Mapping[str, Evaluation], model: Mapping[str, Any], digests: Digests | None
) -> dict[str, Any]:
    return {
        _RECORDED[name]: ingredients.of_evaluation(entry.config, model, entry.test_sets, digests)
        for name, entry in evaluations.items()
    }


def with_test_sets(config: Mapping[str, Any]) -> Evaluation:
    """Return an evaluation with its test sets; :class:`DataError` or :class:`EvaluationError` without them."""
    known = settings(config, {"model_name_or_path": "-"}, Path("-"))
    return Evaluation(config, {str(d): load_test_set(known.task, known.task_dir, str(d)) for d in known.directions})


def is_trained(job: Job) -> bool:
    """Return whether the host finished the training: the model is saved, then these two files are written."""
    written = (job.model_folder / "train_results.json", job.model_folder / "trainer_state.json")
    return job.cell is None or all(path.is_file() for path in written)


def is_evaluated(job: Job, evaluation: str = TEST) -> bool:
    """Return whether the host finished one of the job's evaluations."""
    return (job.folder / evaluation / "results.json").is_file()


def is_done(job: Job) -> bool:
    """Return whether nothing is left to do of a job, and what is there was made of what it asks for."""
    evaluated = all(is_evaluated(job, name) for name in job.evaluations)
    return changed(job) is None and job.record.is_file() and is_trained(job) and evaluated


def changed(job: Job) -> str | None:
    """Return what differs from what the job's folder was made of, in words; None where nothing does."""
    before = (read_json(job.record) or {}).get("made_of")
    return ingredients.difference(before, job.made_of) if before is not None else None


def make_ready(job: Job) -> None:
    """Write the job's files. What was made of something else is removed, and the rest is there to be continued."""
    before = (read_json(job.record) or {}).get("made_of") or {}
    if ingredients.difference(before.get("training"), job.made_of["training"]) is not None or not before:
        shutil.rmtree(job.folder, ignore_errors=True)
    else:
        for name in job.evaluations:
            if ingredients.difference(before.get(_RECORDED[name]), job.made_of[_RECORDED[name]]) is not None:
                (job.folder / name / "results.json").unlink(missing_ok=True)
                _make_room(job, name)

    if job.cell is not None:
        write_yaml(job.train_yaml, dict(job.cell.config), f"llamafactory-cli train {job.train_yaml}")
    for name, entry in job.evaluations.items():
        path = job.yaml_of(name)
        write_yaml(path, eval_yaml(entry.config, job.model, job.folder / name), f"llamafactory-cli eval {path}")
    mark_resumed(job, was_resumed(job))


def was_resumed(job: Job) -> bool:
    """Tell whether the job's training was interrupted and continued."""
    return bool((read_json(job.record) or {}).get("resumed"))


def mark_resumed(job: Job, resumed: bool) -> None:
    """Record what the job is made of, and whether its training was interrupted."""
    write_json(job.record, {"id": job.id, "resumed": resumed, "made_of": job.made_of})


def _make_room(job: Job, name: str) -> None:
    """Remove an evaluation that this one cannot continue: other decoding, another template, other test sets."""
    entry, folder = job.evaluations[name], job.folder / name
    fingerprints = {direction: test_set.fingerprint for direction, test_set in entry.test_sets.items()}
    try:
        check_workspace(settings(entry.config, job.model, folder), fingerprints)
    except EvaluationError:
        shutil.rmtree(folder)
