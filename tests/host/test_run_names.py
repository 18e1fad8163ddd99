"""A misspelled template or data set, a student or an output folder that is not there: one line, in every command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch  # noqa: F401  (registers the plug-in, as in every process of the host)
import typer
from helpers.runs import base_config, train, write_yaml
from typer.testing import CliRunner

from llamafactory_sekd.errors import ArgumentError, DataError, EvaluationError, SekdError
from llamafactory_sekd.host.cache import tokenized
from llamafactory_sekd.host.corpus import read_with
from llamafactory_sekd.host.data_command import app as data_app
from llamafactory_sekd.host.evaluate import build_host
from llamafactory_sekd.host.run_names import wrong_names


NAMES = [
    ({"dataset": "tinny"}, "Data set 'tinny' is not declared in `dataset_dir: {root}/data`: did you mean 'tiny'?"),
    ({"dataset": "tiny,nope"}, "Data set 'nope' is not declared in `dataset_dir: {root}/data`: use one of tiny, "),
    ({"eval_dataset": "tiny_vaild", "do_eval": True}, "Data set 'tiny_vaild' is not declared in "),
    ({"dataset_dir": "{root}/nowhere"}, "Data set 'tiny' is not declared: {root}/nowhere/dataset_info.json does not "),
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
def test_a_misspelled_name_is_refused_where_a_cache_is_built(root, keys):
    with pytest.raises(SekdError, match="did you mean"):
        tokenized(base_config(root, output_dir=str(root / "out"), **keys))


MISSING_DATA = [
    ({"dataset": "tinny"}, "Data set 'tinny' is not declared in `dataset_dir: {root}/data`: did you mean 'tiny'?"),
    ({"dataset_dir": "{root}/nowhere"}, "Data set 'tiny' is not declared: {root}/nowhere/dataset_info.json does not "),
    ({"template": "parot"}, "`template`: LLaMA-Factory has no template 'parot': did you mean 'parrot'?"),
]
MISSING_MODELS = [
    ({"model_name_or_path": "{root}/studnt"}, "`model_name_or_path: {root}/studnt` does not exist: did you mean '"),
    ({"model_name_or_path": "{root}/data"}, "`model_name_or_path: {root}/data` holds no config.json"),
    (
        {"teacher_model": "{root}/teachr"},
        "`teacher_model: {root}/teachr` does not exist: did you mean '",
    ),
    (
        {"teacher_model": "{root}/no/such"},
        "`teacher_model: {root}/no/such` does not exist: give a folder with a model",
    ),
    ({"teacher_model_adapters": "{root}/data"}, "`teacher_model_adapters: {root}/data` holds no adapter_config.json"),
    ({"adapter_name_or_path": "{root}/no/such"}, "`adapter_name_or_path: {root}/no/such` does not exist: give the "),
]


@pytest.mark.parametrize("stage", ["sekd", "sft"])
@pytest.mark.parametrize(("keys", "problem"), [*MISSING_DATA, *MISSING_MODELS], ids=lambda value: str(value)[:40])
def test_a_plan_names_what_does_not_exist_and_its_verdict_says_so(root, capsys, stage, keys, problem):
    keys = {key: value.format(root=root) for key, value in keys.items()}
    if stage == "sft":
        if any(key.startswith("teacher_") for key in keys):
            pytest.skip("a run of this stage has no teacher")
        keys = {**keys, "stage": "sft", "teacher_model": None}
    adapters = {"finetuning_type": "lora"} if "adapter_name_or_path" in keys else {}
    assert _doctor(base_config(root, output_dir=str(root / "out"), **adapters, **keys), root) == 2
    lines = capsys.readouterr().out.splitlines()
    problems = [line.removeprefix("Problem: ") for line in lines if line.startswith("Problem: ")]
    assert [line[: len(problem.format(root=root))] for line in problems] == [problem.format(root=root)]
    assert lines[-1].startswith("Verdict: this run cannot start: a problem is named above. ")
    assert ("In memory it fits" in lines[-1]) == (problem in [told for _, told in MISSING_DATA])


def test_a_plan_names_all_problems_at_once(root, capsys):
    keys = {"dataset": "tinny", "template": "parot", "teacher_model": str(root / "teachr")}
    assert _doctor(base_config(root, output_dir=str(root / "out"), **keys), root) == 2
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("Problem: ") for line in lines) == 3
    assert lines[-1].startswith("Verdict: this run cannot start: 3 problems are named above. ")


def test_the_verdict_on_data_that_is_declared_and_not_written_yet_says_so(root, capsys):
    assert _doctor(base_config(root, output_dir=str(root / "out"), dataset="gone"), root) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("Its data cannot be read yet (see above).")


def _doctor(config, root) -> int:
    """Return the command's exit status."""
    from llamafactory_sekd.host.doctor import doctor

    # The command silences the host by its environment; later tests of this process read the host's log.
    with patch.dict(os.environ):
        try:
            doctor(write_yaml(root / "x.yaml", config), None, None, None, None, 0.5, 0)
        except typer.Exit as end:
            return end.exit_code
    return 0


def test_a_plan_passes_what_does_not_exist_yet(root):
    from llamafactory_sekd.host.memory_plan import parse

    for keys in ({"dataset": "gone"}, {"dataset": "alma_en_de", "dataset_dir": str(root / "nowhere")}):
        assert wrong_names(parse(base_config(root, **keys))) == ([], [])


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


@pytest.mark.parametrize(
    ("made_with", "template", "remedy"),
    [
        ("parrot", "qwen", "`template: parrot`"),
        ("plain", "parrot", "a chat template"),
        ("parrot", "parrot", None),
        ("plain", "qwen", None),
    ],
)
def test_data_made_for_another_template_get_a_line_in_a_run_and_in_its_plan(
    root, capsys, said, made_with, template, remedy
):
    (root / "x.tsv").write_text("".join(f"Sentence {n}.\tSatz {n}.\n" for n in range(8)))
    made = ["pairs", "--tsv", str(root / "x.tsv"), "--from", "en", "--to", "de", "--name", "mine"]
    made += ["--out", str(root / "data"), *(["--plain"] if made_with == "plain" else [])]
    assert CliRunner().invoke(data_app, made).exit_code == 0
    keys = {"dataset": "mine", "template": template, "output_dir": str(root / "out"), "max_steps": 1}
    train(base_config(root, **keys))
    told = [line for line in said.messages if "'mine' was made with" in line]
    capsys.readouterr()
    _doctor(base_config(root, **keys), root)
    planned = [line for line in capsys.readouterr().out.splitlines() if "'mine' was made with" in line]
    assert len(told) == len(planned) == (remedy is not None)
    assert all(remedy in line and f"`template` is {template}" in line for line in [*told, *planned])
