"""What the page offers without being asked: teachers, the checkpoint to evaluate, the folder of the results."""

from __future__ import annotations

import pytest

from llamafactory_sekd.presets import PRESETS
from llamafactory_sekd.webui.evaluation_process import checkpoint_list, follow_test_set, report_files
from llamafactory_sekd.webui.panel import equation


def test_complete_models_anywhere_below_saves_are_suggested_as_teachers(tmp_path, monkeypatch):
    from llamafactory.extras.constants import SUPPORTED_MODELS

    from llamafactory_sekd.host.webui_page import list_teachers

    monkeypatch.chdir(tmp_path)
    for folder, files in {
        "saves/paper/teacher13b": ["config.json", "model-00001-of-00002.safetensors"],
        "saves/Custom/full/run/checkpoint-10": ["config.json", "pytorch_model.bin"],
        "saves/Custom/lora/run": ["adapter_config.json", "adapter_model.safetensors"],
        "saves/half": ["config.json"],
    }.items():
        (tmp_path / folder).mkdir(parents=True)
        for name in files:
            (tmp_path / folder / name).touch()

    count = len(SUPPORTED_MODELS)
    assert list_teachers()[:-count] == ["saves/Custom/full/run/checkpoint-10", "saves/paper/teacher13b"]
    assert list_teachers()[-count:] == list(SUPPORTED_MODELS)


def test_a_results_folder_follows_the_test_set_until_the_user_names_one():
    save_dir, followed = follow_test_set("wmt21", "results/wmt22", "results/wmt22")
    assert (save_dir, followed) == ("results/wmt21", "results/wmt21")
    save_dir, followed = follow_test_set("flores 200", "results/mine", followed)
    assert save_dir == "results/mine"
    assert follow_test_set("wmt22", save_dir, followed)[0] == "results/mine"
    assert follow_test_set("../etc", " ", followed)[0] == "results/etc"


@pytest.mark.parametrize(("chosen", "listed"), [(None, []), ("", []), ("a", ["a"]), (["a", "b"], ["a", "b"])])
def test_the_page_s_checkpoint_is_a_list_to_evaluate(chosen, listed):
    assert checkpoint_list(chosen) == listed


def test_only_files_that_the_page_may_serve_are_offered(tmp_path, monkeypatch):
    (tmp_path / "results" / "x").mkdir(parents=True)
    (tmp_path / "results" / "x" / "report.html").touch()
    (tmp_path / "results" / "x.log").touch()
    monkeypatch.chdir(tmp_path)
    names = [path.rsplit("/", 1)[-1] for path in report_files(tmp_path / "results" / "x")]
    assert names == ["report.html", "x.log"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "elsewhere"))
    assert report_files(tmp_path / "results" / "x") == []


@pytest.mark.parametrize("kd_loss", PRESETS)
def test_every_objective_has_a_latex_equation_of_its_own(kd_loss):
    assert equation(kd_loss).startswith("$$")
    assert len({equation(name) for name in PRESETS}) == len(PRESETS)


def test_an_objective_that_the_page_does_not_know_has_none():
    assert equation("of another package") == ""
