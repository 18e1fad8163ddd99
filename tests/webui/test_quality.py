from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from llamafactory_sekd.errors import SekdError
from llamafactory_sekd.evaluation.evaluation_settings import parse_settings
from llamafactory_sekd.webui.evaluation_process import (
    EvaluationProcess,
    Progress,
    as_yaml,
    check_config,
    draw_report,
    evaluation_config,
    system_names,
)


FIELDS = {
    "task": "wmt22",
    "task_dir": " wmt ",
    "directions": ["en-de"],
    "baseline": "base",
    "metrics": ["bleu", "comet?"],
    "comet_model": "Unbabel/wmt22-comet-da",
    "prompt": " plain ",
    "num_beams": 1.0,
    "max_new_tokens": 256,
    "save_dir": "results/wmt22",
}
SYSTEMS = {
    "base": {"model_name_or_path": "student", "trust_remote_code": True},
    "sekd": {"model_name_or_path": "student", "adapter_name_or_path": "saves/sekd", "trust_remote_code": True},
    "teacher": {"model_name_or_path": "teacher", "trust_remote_code": True},
}


def test_the_yaml_says_to_the_evaluation_what_the_fields_say():
    settings = parse_settings(yaml.safe_load(as_yaml(evaluation_config(FIELDS, SYSTEMS, "parrot"))), "test")
    assert {system.name: dict(system.model) for system in settings.systems} == SYSTEMS
    assert (settings.baseline, settings.teacher) == ("base", "teacher")
    assert (settings.task, str(settings.task_dir), str(settings.save_dir)) == ("wmt22", "wmt", "results/wmt22")
    assert [str(direction) for direction in settings.directions] == ["en-de"]
    assert (settings.metrics, "comet" in settings.optional) == (("bleu", "comet"), True)
    assert settings.systems[0].prompt.name == "plain"
    assert (settings.decoding.num_beams, settings.decoding.max_new_tokens) == (1, 256)


def test_keys_that_do_not_apply_stay_out_of_the_yaml():
    fields = {**FIELDS, "baseline": "", "metrics": ["bleu"]}
    config = evaluation_config(fields, {"base": SYSTEMS["base"]}, "parrot")
    assert not {"baseline", "teacher", "comet_model"} & config.keys()


def test_systems_get_names_that_the_evaluation_takes_each_its_own():
    checkpoints = ["train_2026-01-01", "/models/a b/", "x/a b", "base", "teacher", "…"]
    names = system_names(checkpoints, with_base=True, with_teacher=True)
    assert list(names) == ["base", "train_2026-01-01", "a-b", "a-b-2", "base-2", "teacher-2", "system", "teacher"]
    assert [checkpoint for checkpoint in names.values() if checkpoint] == checkpoints
    config = evaluation_config(FIELDS, dict.fromkeys(names, SYSTEMS["base"]), "parrot")
    assert len(parse_settings(config, "test").systems) == len(names)


def test_without_models_or_test_set_the_check_says_what_is_missing(tmp_path: Path):
    with pytest.raises(SekdError, match="`systems` must map at least one name"):
        check_config(evaluation_config({**FIELDS, "baseline": ""}, {}, "parrot"))
    with pytest.raises(SekdError, match="is not a directory"):
        check_config(evaluation_config({**FIELDS, "task_dir": str(tmp_path / "none")}, SYSTEMS, "parrot"))
    (tmp_path / "en-de.en").write_text("a house\n", encoding="utf-8")
    (tmp_path / "en-de.de").write_text("ein Haus\n", encoding="utf-8")
    check_config(evaluation_config({**FIELDS, "task_dir": str(tmp_path)}, SYSTEMS, "parrot"))


def test_the_output_reads_as_in_a_terminal_and_its_last_bar_is_the_progress(tmp_path: Path):
    process = EvaluationProcess()
    assert (process.output(), process.progress(), process.running) == ([], None, False)
    process.save_dir = tmp_path / "run"
    bars = "\rbase en-de:   0%|          | 0/12 [00:00<?]\rbase en-de:  75%|███████▌  | 9/12 [00:01<00:00]"
    (tmp_path / "run.log").write_text(f"loading 1/2\n{bars}\nCOMET 100% done\n", encoding="utf-8")
    assert process.output()[0] == "loading 1/2"
    assert process.output()[1].startswith("base en-de:  75%")
    assert process.progress() == Progress("base en-de", 9, 12)


def test_the_child_is_the_real_evaluation_and_its_message_reaches_the_page(tmp_path: Path):
    process = EvaluationProcess()
    process.start("task: wmt99\n", tmp_path / "deep" / "run")
    deadline = time.monotonic() + 1200
    while process.running and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.return_code == 2
    assert not process.stopped
    assert "llamafactory-cli eval: error:" in "\n".join(process.output())
    assert process.config_path(tmp_path / "deep" / "run").read_text(encoding="utf-8") == "task: wmt99\n"


def test_stopping_ends_the_child(tmp_path: Path):
    process = EvaluationProcess()
    process.start("task: wmt22\n", tmp_path / "run")
    assert process.running
    process.stop()
    deadline = time.monotonic() + 1200
    while process.running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process.running
    assert process.stopped
    process.stop()  # once more does nothing


def test_the_picture_shows_every_metric_that_was_computed_and_the_similarity(tmp_path: Path):
    assert draw_report(tmp_path) is None
    scores = {"base": 10.0, "teacher": 30.0}
    results = {
        "metrics": ["bleu", "comet"],
        "skipped": {"comet": "no checkpoint"},
        "directions": ["en-de", "de-en"],
        "systems": {
            name: {
                "scores": {direction: {"bleu": value, "comet": None} for direction in ("en-de", "de-en")},
                "similarity": None if name == "teacher" else {"en-de": 5.0, "de-en": None, "average": 5.0},
            }
            for name, value in scores.items()
        },
    }
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    figure = draw_report(tmp_path)
    titles = [axes.get_title(loc="left").replace("\n", " ") for axes in figure.axes]
    assert titles == ["BLEU", "similarity to the teacher (BLEU)"]
    assert [bar.get_height() for bar in figure.axes[0].patches] == [10.0, 10.0, 30.0, 30.0]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [5.0, 0.0]
