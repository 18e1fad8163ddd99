"""The names in a YAML of our stage: template, data sets, student, output folder. What is not there is one line."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from llamafactory_sekd.arguments import SELF
from llamafactory_sekd.data.alma import command_for
from llamafactory_sekd.data.prompts import PARROT, prompt_in_manifest
from llamafactory_sekd.errors import ArgumentError, DataError, SekdError, one_line, suggestion
from llamafactory_sekd.files import read_json
from llamafactory_sekd.host.run_arguments import HostArguments
from llamafactory_sekd.host.teacher_loading import each_teacher, teacher_identity
from llamafactory_sekd.host.templates import check_template
from llamafactory_sekd.teacher.compatibility import check_adapter_files, check_model_files, check_teacher_files


logger = logging.get_logger(__name__)

_INFO = "dataset_info.json"
# What transformers and the host read a model's weights from.
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.index.json")


def check_names(run: HostArguments) -> None:
    """Check the names in a YAML of our stage, before anything is loaded; warn of data made for another template.

    Raises:
        ArgumentError: the template is unknown, or the student's folder does not exist or holds no model.
        DataError: a data set is not declared, or its file does not exist.
    """
    check_template("template", run.data.template)
    for name in _data_sets(run):
        _check_data_set(name, run.data.dataset_dir, planned=False)
    _check_student_files(run)
    for line in made_for_another_template(run) if run.is_first_rank else ():
        logger.warning(line)


def made_for_another_template(run: HostArguments) -> list[str]:
    """Return a line for each of our data sets whose prompt belongs to another template.

    The manifest next to a data set tells with which prompt it was made; of data without one nothing is known.
    """
    template, folder, lines = run.data.template, run.data.dataset_dir, []
    for name in _data_sets(run) if isinstance(folder, str) else ():
        entry = (read_json(Path(folder) / _INFO) or {}).get(name)
        file_name = entry.get("file_name") if isinstance(entry, Mapping) else None
        made_with = prompt_in_manifest(Path(folder, file_name)) if isinstance(file_name, str) else None
        if made_with is None or (made_with == PARROT.name) == (template == PARROT.name):
            continue
        text = "Parrot's prompt" if made_with == PARROT.name else f"the prompt {made_with!r}"
        remedy = (
            "a chat template"
            if template == PARROT.name
            else "`template: parrot`, or make it again with `sekd data pairs --plain`"
        )
        lines.append(f"Data set {name!r} was made with {text}, and `template` is {template}: use {remedy}.")
    return lines


def wrong_names(run: HostArguments) -> tuple[list[str], list[str]]:
    """Return what is wrong with the names in a YAML that is planned, a line each: of template and data, of models.

    A plan needs neither the files of declared data sets nor weights, so these may be missing.
    """
    data = [partial(check_template, "template", run.data.template)]
    data += [partial(_check_data_set, name, run.data.dataset_dir, planned=True) for name in _data_sets(run)]
    models = [partial(_check_student_files, run)]
    if run.finetuning.use_sekd and run.finetuning.teacher_model:
        models += [partial(_check_teacher_files, run, one) for one in each_teacher(run)]
    return _messages(data), _messages(models)


def _messages(checks: Iterable[Callable[[], object]]) -> list[str]:
    found = []
    for check in checks:
        try:
            check()
        except SekdError as error:
            found.append(str(error))
    return found


def _data_sets(run: HostArguments) -> list[str]:
    tokenized = run.data.tokenized_path
    if tokenized and Path(tokenized).is_dir():
        return []
    return list(dict.fromkeys([*(run.data.dataset or []), *(run.data.eval_dataset or [])]))


def _check_student_files(run: HostArguments) -> None:
    check_model_files(run.model.model_name_or_path, "model_name_or_path", "adapter_name_or_path", ArgumentError)
    check_adapter_files(run.model.adapter_name_or_path or [], "adapter_name_or_path", ArgumentError)


def _check_teacher_files(run: HostArguments, one: HostArguments) -> None:
    name, adapters, _ = teacher_identity(run.model, one.finetuning)
    if one.finetuning.teacher_model != SELF:
        check_teacher_files(name)
    check_adapter_files(adapters.split(",") if adapters else [])


def _check_data_set(name: str, folder: Any, planned: bool) -> None:
    """Refuse what the host would not find in a folder; it looks for data sets of its other places itself."""
    if command_for(name) or (isinstance(folder, str) and (folder == "ONLINE" or folder.startswith("REMOTE:"))):
        return  # of ours, `explain_undefined` says which command makes it
    info = folder if isinstance(folder, Mapping) else read_json(Path(folder) / _INFO)
    if not isinstance(info, Mapping):
        raise DataError(
            f"Data set {name!r} is not declared: {Path(folder) / _INFO} does not exist or is no JSON object; set "
            "`dataset_dir` to the folder that declares your data sets."
        )
    entry = info.get(name)
    if not isinstance(entry, Mapping):
        raise DataError(
            f"Data set {name!r} is not declared in `dataset_dir: {folder}`{suggestion(name, map(str, info))}"
        )
    elsewhere = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
    if isinstance(folder, str) and not any(key in entry for key in elsewhere):
        path = Path(folder, str(entry.get("file_name", "")))
        if "file_name" not in entry or not (planned or path.exists()):
            raise DataError(
                f"The file {path} of data set {name!r} does not exist: correct `file_name` in {Path(folder) / _INFO}."
            )


def check_student(run: HostArguments) -> None:
    """Check that the student's configuration can be read and its folder has weights, which a plan does without.

    Raises:
        ArgumentError: one of them is not so.
    """
    from llamafactory.model import load_config, load_tokenizer

    name = run.model.model_name_or_path
    folder = Path(name).expanduser()
    has_weights = any(next(folder.glob(kind), None) for kind in _WEIGHTS)
    if folder.is_dir() and not run.model.train_from_scratch and not has_weights:
        raise ArgumentError(
            f"`model_name_or_path: {name}` holds no weights ({', '.join(_WEIGHTS[:2])}): give the folder of a saved "
            "model, or set `train_from_scratch: true`."
        )
    try:
        load_config(run.model)
        load_tokenizer(run.model)
    except OSError as error:
        cause = one_line(str(error.__cause__ or error)).split(". ")[0]
        raise ArgumentError(
            f"`model_name_or_path: {name}` cannot be loaded ({cause}): check the path or hub id."
        ) from error


def check_output(output_dir: str) -> None:
    """Make a run's output folder and write there once, rather than find out when the trained model is saved.

    Raises:
        ArgumentError: the system refuses.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as stream:
            stream.write(b"?")
    except OSError as error:
        raise ArgumentError(
            f"`output_dir: {output_dir}` cannot be written to ({error.strerror}): choose another folder."
        ) from error
