"""`sekd study` with the real `llamafactory-cli`: killed, continued, with a failing cell and a cached teacher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from helpers import tiny
from helpers.forks import forked
from helpers.runs import base_config, write_yaml


SEKD = str(Path(sys.executable).with_name("sekd"))
SENTENCES = tiny.SENTENCES[:4]


@pytest.fixture(scope="module")
def story(tiny_root, tmp_path_factory) -> SimpleNamespace:
    """One study, started, killed in a training, and started again until there is nothing left to do."""
    root = tmp_path_factory.mktemp("study")
    (root / "test").mkdir()
    for language, lines in zip(("en", "de"), zip(*SENTENCES, strict=True), strict=True):
        (root / "test" / f"en-de.{language}").write_text("".join(f"{line}\n" for line in lines))
    train = base_config(tiny_root, eval_dataset="tiny_valid", eval_strategy="steps", eval_steps=20, max_steps=40)
    train |= {"save_strategy": "steps", "save_steps": 5, "plot_loss": True}
    sft = {**{key: value for key, value in train.items() if key != "teacher_model"}, "stage": "sft"}
    evaluation = {"task": "wmt22", "task_dir": "test", "directions": ["en-de"], "metrics": ["bleu", "chrf"]}
    study = {
        "output_dir": "out",
        "train": str(write_yaml(root / "train.yaml", train)),
        "evaluation": str(write_yaml(root / "eval.yaml", {**evaluation, "max_new_tokens": 6})),
        "teacher_cache": "cache",
        "systems": {
            "Broken": {"learning_rate": "fast"},
            "SKEW": {"kd_loss": "skew"},
            "SFT": {"train": str(write_yaml(root / "sft.yaml", sft)), "finetuning_type": "lora", "lora_target": "all"},
        },
        "models": {"Teacher": {"model_name_or_path": str(tiny_root / "teacher")}},
        "teacher": "Teacher",
        "matrix": {"kd_lambda": [0.5]},
        "seeds": [3],
    }
    words = [SEKD, "study", str(write_yaml(root / "study.yaml", study)), "--jobs", "2"]
    cell = root / "out" / "cells" / "skew-kd_lambda=0.5-seed=3"

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(words, cwd=root, env=environment, stdout=-3, stderr=-3)
    wait_for(lambda: (cell / "model" / "checkpoint-5" / "trainer_state.json").exists() or killed.poll() is not None)
    children = psutil.Process(killed.pid).children(recursive=True)
    killed.send_signal(signal.SIGKILL)
    status = killed.wait()
    gone, alive = psutil.wait_procs(children, timeout=1200)
    again = forked(words, cwd=root)
    models = sorted((root / "out").glob("**/model*.safetensors"))
    written = {path: path.stat().st_mtime_ns for path in models}
    third = forked(words, cwd=root)
    return SimpleNamespace(
        root=root,
        cell=cell,
        killed=SimpleNamespace(status=status, children=children, gone=gone, alive=alive),
        again=again,
        third=third,
        written=written,
        results=json.loads((root / "out" / "results.json").read_text()),
    )


def wait_for(condition) -> None:
    deadline = time.monotonic() + 1200  # only detects a hang
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("matrix.kd_gama=[1]", "unknown key 'kd_gama': did you mean 'kd_gamma'?"),
        ("overrides.learning_rat=1", "unknown key 'learning_rat': did you mean 'learning_rate'?"),
    ],
)
def test_a_misspelled_key_is_refused_before_anything_starts(tmp_path, override, message):
    keys = {"output_dir": "out", "train": "train.yaml", "evaluation": "eval.yaml", "systems": {"A": {}}}
    write_yaml(tmp_path / "train.yaml", base_config(tmp_path))
    write_yaml(tmp_path / "eval.yaml", {"task": "wmt22", "directions": ["en-de"]})
    write_yaml(tmp_path / "study.yaml", keys)
    refused = forked([SEKD, "study", "study.yaml", override, "--list"], cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].endswith(message)
    assert not (tmp_path / "out").exists()


def test_kill_9_ends_the_children_too(story):
    assert story.killed.status == -signal.SIGKILL
    assert story.killed.children
    assert not story.killed.alive


@pytest.mark.slow
def test_the_same_command_continues_from_the_checkpoint_and_finishes(story):
    assert story.again.returncode == 2, story.again.stdout + story.again.stderr
    log = (story.cell / "train.log").read_text()
    assert log.count("$ ") == 2
    assert "resume_from_checkpoint=" in log
    entry = next(cell for cell in story.results["cells"] if cell["id"] == "skew-kd_lambda=0.5-seed=3")
    assert entry["training"]["resumed"] is True
    assert entry["training"]["steps"] == 40
    assert entry["validation"]["nll"] == entry["validation"]["eval_kd/ce"] > 0
    assert set(entry["scores"]["en-de"]) == {"bleu", "chrf"}
    assert entry["similarity"]["average"] is not None
    assert entry["guards"]["en-de"]["hit_max_new_tokens"] is not None
    assert len((story.root / "out" / entry["hypotheses"]["en-de"]).read_text().splitlines()) == len(SENTENCES)
    history = json.loads((story.root / "out" / entry["history"]).read_text())["log_history"]
    assert [row["step"] for row in history if "kd/difficulty" in row] == list(range(1, 41))
    assert (story.cell / "model" / "training_loss.png").exists()
    assert not list(story.cell.glob("model/checkpoint-*"))


@pytest.mark.slow
def test_the_cached_teacher_was_computed_once_and_no_cell_loads_one(story):
    assert (story.root / "out" / "logs" / "teacher_cache.log").read_text().count("$ ") == 1
    entry = next(cell for cell in story.results["cells"] if cell["id"] == "skew-kd_lambda=0.5-seed=3")
    assert entry["config"]["teacher_cache"] == "cache"
    assert "teacher_model" not in entry["config"]
    assert story.results["models"][0]["name"] == "Teacher"
    assert story.results["models"][0]["scores"]["average"]["chrf"] is not None


@pytest.mark.slow
def test_the_hosts_own_sft_and_its_adapters_appear_next_to_the_distilled(story):
    entry = next(cell for cell in story.results["cells"] if cell["system"] == "SFT")
    assert (entry["id"], entry["axes"]) == ("sft-seed=3", {})
    assert entry["validation"]["nll"] == entry["validation"]["eval_loss"]
    assert entry["scores"]["average"]["chrf"] is not None
    assert (story.root / "out" / entry["model"] / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_report_is_written_over_what_there_is(story):
    assert "out/report.html" in story.third.stdout
    report = (story.root / "out" / "report.md").read_text()
    assert "SKEW" in report
    assert "Broken" in report  # as missing


@pytest.mark.slow
def test_a_failing_cell_is_named_with_its_log_and_tried_again_while_done_ones_stay(story):
    for run in (story.again, story.third):
        assert run.returncode == 2
        assert "✗ broken-kd_lambda=0.5-seed=3: status 1, " in run.stdout
        assert "1 failed: broken-kd_lambda=0.5-seed=3. The same command tries them again." in run.stdout
    assert "3 of 4 done before." in story.third.stdout
    assert {path: path.stat().st_mtime_ns for path in story.written} == story.written
    assert (story.cell / "train.log").read_text().count("$ ") == 2
    broken = next(cell for cell in story.results["cells"] if cell["id"] == "broken-kd_lambda=0.5-seed=3")
    assert (broken["training"], broken["scores"]) == (None, None)


def test_a_bad_study_is_one_line_with_status_2(tmp_path):
    path = write_yaml(tmp_path / "study.yaml", {"output_dir": "out", "train": "x", "evaluation": "y", "systems": {}})
    done = forked([SEKD, "study", str(path)], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "sekd study: error: `systems` must name at least one system.\n"
