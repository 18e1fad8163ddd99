"""A misspelled template or data set, a student or an output folder that is not there: one line, in every command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch  # noqa: F401  (registers the plug-in, as in every process of the host)
from helpers.runs import base_config, train, write_yaml

from llamafactory_sekd.errors import ArgumentError, DataError, EvaluationError, SekdError
from llamafactory_sekd.host.cache import tokenized
from llamafactory_sekd.host.corpus import read_with
from llamafactory_sekd.host.evaluate import build_host
from llamafactory_sekd.host.run_names import check_names


NAMES = [
    ({"dataset": "tinny"}, "Data set 'tinny' is not declared in `dataset_dir: {root}/data`: did you mean 'tiny'?"),
    ({"dataset": "tiny,nope"}, "Data set 'nope' is not declared in `dataset_dir: {root}/data`: use one of tiny, "),
    ({"eval_dataset": "tiny_vaild", "do_eval": True}, "Data set 'tiny_vaild' is not declared in "),
    ({"dataset_dir": "{root}/nowhere"}, "Data set 'tiny' is not found: {root}/nowhere/dataset_info.json does not "),
    ({"dataset": "gone"}, "The file {root}/data/gone.json of data set 'gone' does not exist: correct `file_name` in "),
    ({"dataset": "nameless"}, "The file {root}/data of data set 'nameless' does not exist: correct `file_name` in "),
    ({"template": "parot"}, "`template`: LLaMA-Factory has no template 'parot': did you mean 'parrot'?"),
    ({"template": "zzzzzz"}, "`template`: LLaMA-Factory has no template 'zzzzzz'."),
    ({"model_name_or_path": "{root}/nowhere"}, "`model_name_or_path: {root}/nowhere` does not exist: give a folder "),
    (
        {"model_name_or_path": "{root}/data"},
        "`model_name_or_path: {root}/data` holds no config.json: give the folder ",
    ),
    ({"model_name_or_path": "{root}/weightless"}, "`model_name_or_path: {root}/weightless` holds no weights"),
    ({"model_name_or_path": "{root}/wordless"}, "`model_name_or_path: {root}/wordless` cannot be loaded ("),
    (
        {"output_dir": "{root}/data/dataset_info.json/out"},
        "`output_dir: {root}/data/dataset_info.json/out` cannot be ",
    ),
]


@pytest.fixture
def root(tmp_path: Path, tiny_root: Path) -> Path:
    """The models and data of `tiny_root` with some that lack something."""
    for name in ("student", "teacher"):
        (tmp_path / name).symlink_to(tiny_root / name)
    shutil.copytree(tiny_root / "data", tmp_path / "data")
    info = tmp_path / "data" / "dataset_info.json"
    entries = json.loads(info.read_text())
    info.write_text(json.dumps({**entries, "gone": {"file_name": "gone.json"}, "nameless": {"columns": {}}}))
    lacking = {"weightless": "*.safetensors", "wordless": "token*"}
    for name, what in lacking.items():
        shutil.copytree(tiny_root / "student", tmp_path / name)
        for path in (tmp_path / name).glob(what):
            path.unlink()
    return tmp_path


@pytest.mark.parametrize(("keys", "message"), NAMES, ids=lambda value: str(value)[:40])
def test_a_run_names_what_is_not_there_before_anything_is_loaded(root, keys, message):
    keys = {"output_dir": "{root}/out", **keys}
    config = base_config(root, **{key: str(value).format(root=root) for key, value in keys.items()})
    with pytest.raises(SekdError) as caught:
        train(config)
    assert isinstance(caught.value, (ArgumentError, DataError))
    assert str(caught.value).startswith(message.format(root=root))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keys", [{"dataset": "tinny"}, {"template": "parot"}], ids=str)
def test_a_misspelled_name_is_refused_where_a_cache_is_built_and_where_a_run_is_planned(root, keys):
    config = base_config(root, output_dir=str(root / "out"), **keys)
    for call in (lambda: tokenized(config), lambda: _doctor(config, root)):
        with pytest.raises(SekdError, match="did you mean"):
            call()


def _doctor(config, root) -> None:
    from llamafactory_sekd.host.doctor import doctor

    # The command silences the host by its environment; later tests of this process read the host's log.
    with patch.dict(os.environ):
        doctor(write_yaml(root / "x.yaml", config), None, None, None, None, 0.5, 0)


def test_a_plan_passes_what_does_not_exist_yet(root):
    from llamafactory_sekd.host.memory_plan import parse

    for keys in ({"dataset": "gone"}, {"dataset_dir": str(root / "nowhere")}, {"dataset": "alma_en_de"}):
        check_names(parse(base_config(root, **keys)), planned=True)


def test_a_misspelled_template_is_refused_in_an_evaluation_and_where_a_corpus_is_read(root):
    from llamafactory_sekd.data.languages import Direction
    from llamafactory_sekd.evaluation.evaluation_settings import parse_settings

    systems = {"one": {"model_name_or_path": str(root / "student")}}
    keys = {"task": "own", "task_dir": str(root), "directions": ["en-de"], "save_dir": str(root / "r")}
    settings = parse_settings({**keys, "systems": systems, "template": "parot"}, "x.yaml")
    with pytest.raises(EvaluationError, match="did you mean 'parrot'"):
        build_host(settings).describe(settings.systems[0])
    with pytest.raises(ArgumentError, match="did you mean 'parrot'"):
        read_with(str(root / "teacher"), "parot", [], Direction("en", "de"), batch_size=1, memory=root / "x.json")


def test_other_stages_get_the_hosts_own_words(root):
    config = base_config(root, output_dir=str(root / "out"), stage="sft", teacher_model=None, dataset="tinny")
    with pytest.raises(ValueError, match="Undefined dataset tinny") as caught:
        train(config)
    assert not isinstance(caught.value, SekdError)
