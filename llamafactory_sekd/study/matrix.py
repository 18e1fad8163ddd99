"""From a study to its cells: every system at every point of the matrix with every seed, and the train.yaml of each."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.argument_checks import check_distillation_arguments
from llamafactory_sekd.arguments import KEYS, STAGE, DistillationArguments, keys_read_by
from llamafactory_sekd.config import read_config
from llamafactory_sekd.errors import ArgumentError, StudyError, suggestion
from llamafactory_sekd.fingerprints import sha256
from llamafactory_sekd.study.spec import Spec


TEACHER = "teacher"
# What a system may say besides `text: teacher`; the names are those of `sekd translate`.
OPTIONS = (
    *(
        "method",
        "samples",
        "beams",
        "n_best",
        "metric",
        "comet_model",
        "keep",
        "temperature",
        "top_p",
        "top_k",
        "seed",
    ),
    *("max_new_tokens", "length_penalty", "filters", "backend", "batch_tokens", "batch_size"),
    *("in", "from", "to", "from_name", "to_name", "directions", "prompt"),
)
_DEFAULTS = {"method": "beam"}
# Keys of a teacher that is loaded, which a cached one has no use for.
_LOADED_TEACHER = frozenset(
    key for key in KEYS if key.startswith("teacher_") and key not in ("teacher_cache", "teacher_max_nonfinite")
)
# Keys of a system that are no keys of its training.
_OF_STUDY = ("train", "text", "mix")
_OUR_PREFIXES = ("kd_", "teacher_")
# Replaced by the cell's seed in a value, such as a path.
SEED = "{seed}"
# Below the 255 bytes that file systems allow, with room for what tools append.
_LONGEST_ID = 180


@dataclass(frozen=True)
class TeacherText:
    """A data set to make: the teacher's translations of ``dataset``, or of the text that the options name."""

    options: Mapping[str, Any]
    dataset: str | None
    dataset_dir: Path
    folder: Path

    @property
    def name(self) -> str:
        """Return the name of the data set, another one for other options."""
        content = json.dumps([dict(self.options), self.dataset, str(self.dataset_dir)], sort_keys=True)
        return f"teacher_{self.options['method']}_{sha256(content)[:8]}"


@dataclass(frozen=True)
class Cell:
    """One run: a system at a point of the matrix, with a seed.

    ``config`` is its train.yaml; ``source`` the same with the teacher in place of the teacher's cache. Keys of
    the matrix that have no effect on the system are not in ``axes``. ``text`` is what it trains on, where that is the
    teacher's.
    """

    id: str
    system: str
    axes: Mapping[str, Any]
    seed: int
    folder: Path
    config: Mapping[str, Any]
    source: Mapping[str, Any]
    text: TeacherText | None = None

    @property
    def model(self) -> Path:
        """Return the folder of the trained model."""
        return self.folder / "model"

    @property
    def is_distillation(self) -> bool:
        """Tell whether the run is one of the distillation stage."""
        return self.config.get("stage") == STAGE

    @property
    def reads_cache(self) -> bool:
        """Tell whether the study's cache answers for the teacher."""
        return self.config != self.source


def expand(spec: Spec) -> list[Cell]:
    """Return all cells, system by system, then along the matrix, then along the seeds.

    Raises :class:`StudyError` or :class:`ArgumentError` for a file that cannot be read, keys of the stage that cannot
    work, and two cells that would share a folder.
    """
    cells: dict[str, Cell] = {}
    for system in spec.systems:
        for axes, config in _points(spec, system):
            for seed in spec.seeds:
                cell = _cell(spec, system, axes, config, seed)
                if cell.id in cells:
                    raise StudyError(f"Two cells would share the folder {cell.folder}: give the systems other names.")
                cells[cell.id] = cell
    return list(cells.values())


def _points(spec: Spec, system: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each point that differs for this system, and the configuration there."""
    own = {key: value for key, value in spec.systems[system].items() if key not in _OF_STUDY}
    base = read_config(Path(spec.systems[system].get("train", spec.train)), error=StudyError)
    seen: list[dict[str, Any]] = []
    for values in itertools.product(*spec.matrix.values()):
        point = dict(zip(spec.matrix, values, strict=True))
        final = {**base, **spec.overrides, **own, **point}
        axes = {key: value for key, value in point.items() if has_effect(key, final)}
        if axes in seen:
            continue
        seen.append(axes)
        common = {key: value for key, value in spec.overrides.items() if key not in KEYS or _is_ours(final)}
        merged = {**base, **common, **own, **axes}
        yield axes, {key: value for key, value in merged.items() if value is not None}


def has_effect(key: str, config: Mapping[str, Any]) -> bool:
    """Return whether a key of a training YAML says anything to the run that ``config`` describes.

    The keys of the distillation stage say nothing to another stage, and an objective reads only some of them.
    """
    if key not in KEYS:
        return True
    if not _is_ours(config):
        return False
    loss = config.get("kd_loss") or DistillationArguments.kd_loss
    try:
        return key in keys_read_by(loss)
    except ArgumentError:  # refused later, by the checks of all keys
        return True


def _is_ours(config: Mapping[str, Any]) -> bool:
    return config.get("stage") == STAGE


def _cell(spec: Spec, system: str, axes: dict[str, Any], config: dict[str, Any], seed: int) -> Cell:
    name = cell_id(system, axes, seed)
    folder = spec.output_dir / "cells" / name
    seeds = {"seed": seed, **({"data_seed": seed} if "data_seed" in config else {})}
    # Without `overwrite_output_dir` the same command continues an interrupted training.
    ours = {"output_dir": str(folder / "model"), "overwrite_output_dir": False, "report_to": "none", **seeds}
    # A data set or a model to start from may be another one for each seed.
    own = {key: value.replace(SEED, str(seed)) if isinstance(value, str) else value for key, value in config.items()}
    text, source = _text_of(spec, system, {**own, **ours})
    _check(source, name)
    return Cell(name, system, axes, seed, folder, _with_cache(source, spec), source, text)


def _text_of(spec: Spec, system: str, config: Mapping[str, Any]) -> tuple[TeacherText | None, dict[str, Any]]:
    """Return the text that a system asks for, None for the data's own, and its configuration with that data set.

    Raises:
        StudyError: `text` or `mix` cannot work.
    """
    entry = spec.systems[system]
    text, mix = entry.get("text"), entry.get("mix")
    if text is None:
        if mix is not None:
            raise StudyError(f"`systems.{system}.mix` has no effect without `text: {TEACHER}`: remove it.")
        return None, dict(config)
    options = {"model": text} if isinstance(text, str) else dict(text) if isinstance(text, Mapping) else {}
    if options.pop("model", TEACHER) != TEACHER or not isinstance(text, (str, Mapping)):
        raise StudyError(
            f"`systems.{system}.text` must be {TEACHER}, or options of `sekd translate` such as {{method: mbr}}, not "
            f"{text!r}."
        )
    unknown = next((key for key in options if key not in OPTIONS), None)
    if unknown is not None:
        raise StudyError(f"`systems.{system}.text.{unknown}` is unknown{suggestion(str(unknown), OPTIONS)}")
    if spec.teacher is None:
        raise StudyError(f"`systems.{system}.text` needs the study's `teacher`, one of `models`.")
    if mix is not None:
        if isinstance(mix, bool) or not isinstance(mix, (int, float)) or not 0 < mix <= 1:
            raise StudyError(f"`systems.{system}.mix` must be above 0 and at most 1, not {mix!r}.")
        if "in" in options:
            raise StudyError(f"`systems.{system}.mix` needs references, and `text.in` has none: remove one of them.")
        options["mix"] = mix
    dataset = config.get("dataset")
    if "in" not in options and (not isinstance(dataset, str) or "," in dataset):
        raise StudyError(f"`systems.{system}.text` translates one data set, and `dataset` is {dataset!r}.")
    made = TeacherText(
        {**_DEFAULTS, **options},
        None if "in" in options else dataset,
        Path(str(config.get("dataset_dir", "data"))),
        spec.output_dir / "text",
    )
    return made, {**config, "dataset": made.name, "dataset_dir": str(made.folder)}


def _with_cache(config: dict[str, Any], spec: Spec) -> dict[str, Any]:
    # A student's own samples are new text, for which no cache has an answer.
    if spec.teacher_cache is None or not _is_ours(config) or config.get("kd_on_policy"):
        return config
    kept = {key: value for key, value in config.items() if key not in _LOADED_TEACHER}
    folder, teachers = spec.teacher_cache.folder, config.get("teacher_model")
    folders = [folder / name for name in teachers] if isinstance(teachers, Mapping) else [folder]  # as `sekd cache`
    return {**kept, "teacher_cache": ",".join(map(str, folders))}


def _check(config: Mapping[str, Any], name: str) -> None:
    """Check the stage's keys now, instead of in a child after hours."""
    if not config.get("do_train"):
        raise StudyError(f"{name}: `do_train: true` is missing in the training YAML.")
    misspelled = next((key for key in config if key.startswith(_OUR_PREFIXES) and key not in KEYS), None)
    if misspelled is not None:
        raise StudyError(f"{name}: unknown key {misspelled!r}{suggestion(misspelled, KEYS)}")
    if not _is_ours(config):
        return
    try:
        check_distillation_arguments(DistillationArguments(**{key: config[key] for key in KEYS if key in config}))
    except ArgumentError as error:
        raise StudyError(f"{name}: {error}") from None


def check_keys(cells: Sequence[Cell], known: Collection[str]) -> None:
    """Check all keys of all cells now: a misspelled one would fail in a child, after everything before it has run.

    Args:
        cells: of a study.
        known: every key that the host reads in a training YAML, ours included.
    """
    for cell in cells:
        for key in cell.config:
            if key not in known:
                raise StudyError(f"{cell.id}: unknown key {key!r}{suggestion(key, known)}")


def cell_id(system: str, axes: Mapping[str, Any], seed: int) -> str:
    """Return a name that can be read and that every file system takes: ``forward_kd-learning_rate=0.001-seed=42``."""
    parts = [slug(system), *(f"{key}={_shown(value)}" for key, value in axes.items()), f"seed={seed}"]
    name = "-".join(parts)
    if len(name.encode()) <= _LONGEST_ID:
        return name
    digest = sha256(name)[:8]
    kept = name.encode()[: _LONGEST_ID - 20 - len(digest)].decode(errors="ignore")
    return f"{kept}-{digest}-seed={seed}"


def slug(name: str) -> str:
    """Return a name in lower case with ``_`` for everything but letters, digits and dots."""
    short = re.sub(r"[^\w.]+", "_", name.lower()).strip("._")
    if not short:
        raise StudyError(f"`{name}` has no letter or digit, and cannot name a folder: choose another name.")
    return short


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return re.sub(r"[^\w.+]+", "_", str(value)).strip("_") if not isinstance(value, (int, float)) else str(value)
