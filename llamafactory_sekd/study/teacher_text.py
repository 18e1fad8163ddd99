"""Systems that train on the teacher's translations: `text: teacher`, made once for all of them by `sekd translate`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_sekd.children import run_child, tool
from llamafactory_sekd.data.products import DATASET_INFO
from llamafactory_sekd.errors import StudyError, suggestion
from llamafactory_sekd.files import read_json, write_json
from llamafactory_sekd.fingerprints import Digests, sha256
from llamafactory_sekd.study import ingredients
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
_RECORD = "texts.json"
Announce = Callable[[str], AbstractContextManager[Callable[[float], None]]]


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


def of_system(spec: Spec, system: str, config: Mapping[str, Any]) -> tuple[TeacherText | None, dict[str, Any]]:
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


def commands(spec: Spec, texts: Sequence[TeacherText], evaluation: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return ``{name of the data set: the command}``."""
    return {text.name: tool("sekd", "translate", *_words(spec, text, evaluation)) for text in texts}


def make_texts(
    spec: Spec,
    texts: Sequence[TeacherText],
    evaluation: Mapping[str, Any],
    environment: Mapping[str, str],
    announce: Announce,
    stop: threading.Event,
) -> None:
    """Let the teacher translate what it did not translate before; :class:`ChildError` when that fails."""
    record = read_json(spec.output_dir / _RECORD) or {}
    digests = Digests(spec.output_dir / ".digests.json")
    for text in texts:
        made_of = _made_of(spec, text, digests)
        is_there = (text.folder / f"{text.name}.manifest.json").is_file()
        if not is_there or ingredients.difference(record.get(text.name), made_of) is not None:
            [command] = commands(spec, [text], evaluation).values()
            with announce(f"the teacher's text {text.name}") as report:
                log = spec.output_dir / "logs" / f"{text.name}.log"
                run_child(command, log, lambda: 0.0, report, environment=environment, stop=stop)
            record[text.name] = made_of
            write_json(spec.output_dir / _RECORD, record)
        _declare_originals(text)


def _declare_originals(text: TeacherText) -> None:
    """Declare the original data sets next to the teacher's: the host reads training and validation from one folder."""
    info = read_json(text.dataset_dir / DATASET_INFO) or {}
    originals = {
        name: {**entry, "file_name": str((text.dataset_dir / entry["file_name"]).resolve())}
        if isinstance(entry, dict) and "file_name" in entry
        else entry
        for name, entry in info.items()
    }
    path = text.folder / DATASET_INFO
    merged = {**originals, **{name: e for name, e in (read_json(path) or {}).items() if name not in originals}}
    write_json(path, merged)


def _words(spec: Spec, text: TeacherText, evaluation: Mapping[str, Any]) -> list[str]:
    assert spec.teacher is not None
    model = dict(spec.models[spec.teacher])
    words = ["--model", str(model.pop("model_name_or_path"))]
    if "adapter_name_or_path" in model:
        words += ["--adapter", str(model.pop("adapter_name_or_path"))]
    words += ["--template", str(model.pop("template", None) or evaluation.get("template") or "parrot")]
    if text.dataset is not None:
        words += ["--dataset", text.dataset, "--dataset-dir", str(text.dataset_dir)]
    for key, value in text.options.items():
        words += [f"--{key.replace('_', '-')}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    words += ["--out", str(text.folder), "--name", text.name, "--overwrite"]
    return [*words, *(f"{key}={value}" for key, value in model.items())]


def _made_of(spec: Spec, text: TeacherText, digests: Digests) -> dict[str, Any]:
    assert spec.teacher is not None
    source = {**spec.models[spec.teacher], "dataset_dir": str(text.dataset_dir), "dataset": text.dataset}
    found = ingredients.of_training({k: v for k, v in source.items() if v is not None}, None, digests)
    own = text.options.get("in")
    return {
        **found,
        "config": {**dict(spec.models[spec.teacher]), **text.options},
        "text": digests.of_file(Path(str(own))) if own is not None and Path(str(own)).is_file() else None,
    }
