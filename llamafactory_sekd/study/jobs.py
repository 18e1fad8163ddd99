"""What there is to do for each model of a study, what of it is done, and what has to be done again.

A job's folder holds ``train.yaml``, ``eval.yaml``, the host's outputs, and ``cell.json``, which says what the folder
was made of: everything that decides the outcome. Models and data count by content; files that have not changed in size
and time are not read again. What the host leaves behind shows how far a job is, so commands that were run elsewhere
count as well.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.arguments import cache_folders
from llamafactory_sekd.config import read_config, write_yaml
from llamafactory_sekd.data.products import DATASET_INFO
from llamafactory_sekd.data.testsets import TestSet, load_test_set
from llamafactory_sekd.errors import EvaluationError, StudyError
from llamafactory_sekd.evaluation.evaluation_settings import Settings, parse_settings
from llamafactory_sekd.evaluation.translation_store import check_workspace
from llamafactory_sekd.files import read_json, write_json
from llamafactory_sekd.fingerprints import Digests, versions
from llamafactory_sekd.study.matrix import Cell, slug
from llamafactory_sekd.study.spec import Spec, TeacherCache


# The folders of a job's evaluations: on the test sets, and on the validation set that `select` chooses by.
TEST, VALIDATION = "eval", "validation"
# The name of the only system of each evaluation.
SYSTEM = "model"
_REPLACED = ("systems", "baseline", "teacher", "save_dir")
# Keys of a training that decide how its model is loaded.
_LOADING = ("trust_remote_code", "template")
_ADAPTERS = ("lora", "oft")
# In place of a model where keys are looked at before there is one.
_NO_MODEL = {"model_name_or_path": "-"}
# An evaluation's folder -> its key in `made_of`.
_RECORDED = {TEST: "evaluation", VALIDATION: "validation"}
_TRAINING_PACKAGES = ("llamafactory", "torch", "transformers", "peft")
_EVALUATION_PACKAGES = (*_TRAINING_PACKAGES, "sacrebleu", "unbabel-comet")
_MODELS = ("model_name_or_path", "adapter_name_or_path", "teacher_model", "teacher_model_adapters")
_DATASETS = ("dataset", "eval_dataset")
_FILES = ("deepspeed", "fsdp_config")
# They say where things are, or how fast they go.
_INCIDENTAL = ("output_dir", "teacher_cache")
# What is not there (yet, or any more), or is on the hub: it cannot be compared.
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Evaluation:
    """What models are evaluated on: the keys that all of them share, and the test set of each direction."""

    config: Mapping[str, Any]
    test_sets: Mapping[str, TestSet]


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
        training = training_ingredients(cell.source, spec.teacher_cache, digests)
        made_of = {"training": training, **_made_of(evaluations, model, None)}
        jobs.append(Job(cell.id, cell.folder, model, evaluations, made_of, cell))
    return jobs


def _made_of(
    evaluations: Mapping[str, Evaluation], model: Mapping[str, Any], digests: Digests | None
) -> dict[str, Any]:
    return {
        _RECORDED[name]: _evaluation_ingredients(entry.config, model, entry.test_sets, digests)
        for name, entry in evaluations.items()
    }


def with_test_sets(config: Mapping[str, Any]) -> Evaluation:
    """Return an evaluation with its test sets; :class:`DataError` or :class:`EvaluationError` without them."""
    known = _settings(config)
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
    return difference(before, job.made_of) if before is not None else None


def make_ready(job: Job) -> None:
    """Write the job's files. What was made of something else is removed, and the rest is there to be continued."""
    before = (read_json(job.record) or {}).get("made_of") or {}
    if difference(before.get("training"), job.made_of["training"]) is not None or not before:
        shutil.rmtree(job.folder, ignore_errors=True)
    else:
        for name in job.evaluations:
            if difference(before.get(_RECORDED[name]), job.made_of[_RECORDED[name]]) is not None:
                (job.folder / name / "results.json").unlink(missing_ok=True)
                _make_room(job, name)

    if job.cell is not None:
        write_yaml(job.train_yaml, dict(job.cell.config), f"llamafactory-cli train {job.train_yaml}")
    for name, entry in job.evaluations.items():
        path = job.yaml_of(name)
        write_yaml(path, _eval_yaml(entry.config, job.model, job.folder / name), f"llamafactory-cli eval {path}")
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
    try:
        check_workspace(_settings(entry.config, job.model, folder), entry.test_sets)
    except EvaluationError:
        shutil.rmtree(folder)


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return the keys of an evaluation's YAML that a study keeps; :class:`EvaluationError` where one cannot work."""
    config = {key: value for key, value in read_config(path, error=StudyError).items() if key not in _REPLACED}
    _settings(config)
    return config


def metric_models(config: Mapping[str, Any]) -> dict[str, str]:
    """Return name or path of each metric that is a model, such as ``{"comet": "Unbabel/wmt22-comet-da"}``."""
    return dict(_settings(config).models)


def _settings(config: Mapping[str, Any], model: Mapping[str, Any] = _NO_MODEL, save_dir: Path = Path("-")) -> Settings:
    """Return the checked settings of one model's evaluation, or what they are whatever the model."""
    return parse_settings(_eval_yaml(config, model, save_dir), "the study's `evaluation`")


def _eval_yaml(config: Mapping[str, Any], model: Mapping[str, Any], save_dir: Path) -> dict[str, Any]:
    """Return the complete eval.yaml of one model."""
    return {**config, "systems": {SYSTEM: dict(model)}, "save_dir": str(save_dir)}


def model_of(cell: Cell) -> dict[str, Any]:
    """Return a trained cell's entry for the evaluation: the model, or its base with the adapters."""
    loading = {key: cell.config[key] for key in _LOADING if key in cell.config}
    if cell.config.get("finetuning_type", "lora") not in _ADAPTERS:
        return {"model_name_or_path": str(cell.model), **loading}
    base = cell.config.get("model_name_or_path")
    if base is None:
        raise StudyError(f"{cell.id}: `model_name_or_path` is missing in the training YAML.")
    return {"model_name_or_path": base, "adapter_name_or_path": str(cell.model), **loading}


def training_ingredients(source: Mapping[str, Any], cache: TeacherCache | None, digests: Digests) -> dict[str, Any]:
    """Return the ingredients of a training as plain values.

    ``source`` names the teacher and not the study's own ``cache`` of it; caches that the YAML names in a teacher's
    place count by what they hold, wherever they are.
    """
    caches = {} if source.get("teacher_model") else dict(_caches(source, digests))
    return {
        "config": {key: value for key, value in source.items() if key not in _INCIDENTAL},
        "teacher_cache": dict(cache.options) if cache is not None else None,
        "models": {name: _model(name, digests) for key in _MODELS for name in _names(source.get(key))},
        "data": dict(_data(source, digests)),
        "versions": versions(_TRAINING_PACKAGES),
        **({"caches": caches} if caches else {}),
    }


def _evaluation_ingredients(
    config: Mapping[str, Any], model: Mapping[str, Any], test_sets: Mapping[str, TestSet], digests: Digests | None
) -> dict[str, Any]:
    """Return the ingredients of an evaluation; ``digests`` is None for a model whose training is accounted for."""
    names = [name for key in _MODELS for name in _names(model.get(key))] if digests is not None else []
    return {
        "config": {key: value for key, value in config.items() if key not in ("task_dir", "batch_size")},
        "model": {key: value for key, value in model.items() if key not in _MODELS},
        "models": {name: _model(name, digests) for name in names if digests is not None},
        "test_sets": {direction: test_set.fingerprint for direction, test_set in test_sets.items()},
        "versions": versions(_EVALUATION_PACKAGES),
    }


def _names(value: Any) -> list[str]:
    if isinstance(value, Mapping):  # a teacher for each data set
        return [str(name).strip() for name in value.values()]
    names = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(name).strip() for name in names]


def _model(name: str, digests: Digests) -> dict[str, str] | str:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _UNKNOWN
    config = "config.json" if (folder / "config.json").is_file() else "adapter_config.json"
    if not (folder / config).is_file():
        return _UNKNOWN
    return digests.of_model(folder)


def _caches(source: Mapping[str, Any], digests: Digests) -> Iterator[tuple[str, str]]:
    """Yield the digest of each cache's manifest, which names its teacher, by its place among several."""
    folders = cache_folders(source.get("teacher_cache"))
    if not folders:
        return
    from llamafactory_sekd.teacher.cache.cache_manifest import MANIFEST  # loads torch, which most studies plan without

    for number, folder in enumerate(folders, 1):
        manifest = Path(folder).expanduser() / MANIFEST
        yield str(number), digests.of_file(manifest) if manifest.is_file() else _UNKNOWN


def _data(source: Mapping[str, Any], digests: Digests) -> Iterator[tuple[str, Any]]:
    """Yield the digest of every local file that a training reads: data sets with their entries, DeepSpeed's JSON."""
    folder = Path(str(source.get("dataset_dir", "data")))
    info = read_json(folder / DATASET_INFO)
    entries = info if isinstance(info, dict) else {}
    for name in (name for key in _DATASETS for name in _names(source.get(key))):
        entry = entries.get(name)
        path = folder / str(entry.get("file_name", name)) if isinstance(entry, Mapping) else folder / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = {str(file): digests.of_file(file) for file in files if file.is_file()}
        yield name, {"entry": entry, "files": found} if found else _UNKNOWN
    for key in _FILES:
        if isinstance(source.get(key), str) and Path(source[key]).is_file():
            yield key, digests.of_file(Path(source[key]))


def difference(before: Any, now: Any, place: str = "") -> str | None:
    """Return where two ingredients differ first, as words, or None; what is unknown is like anything."""
    if before == now or _UNKNOWN in (before, now):
        return None
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return f"{place} was {_short(before)}, now {_short(now)}"
    for key in dict.fromkeys([*before, *now]):
        found = difference(before.get(key), now.get(key), f"{place}.{key}" if place else str(key))
        if found is not None:
            return found
    return None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}…"
