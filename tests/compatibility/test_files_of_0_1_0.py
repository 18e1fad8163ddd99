"""What 0.1.0 wrote is read: YAML keys, caches, checkpoints, results and studies.

``tests/fixtures/v0_1_0`` was written by 0.1.0 (commit 5b6260f) with torch 2.14.1 and transformers 4.57.6: random
models of one layer, caches in both formats, a run of four steps, an evaluation and a study of two systems, all by its
commands on the YAML files next to them. Nothing in it is made again; the expected figures are those that it logged.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.forks import forked
from helpers.runs import logged, train


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "v0_1_0"
LOSSES = [0.2609, 0.2594, 0.2569, 0.2542]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A copy of the files, so that a run cannot change them, as the working directory."""
    shutil.copytree(FIXTURES, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return Path.cwd()


def settings(**overrides):
    return {**yaml.safe_load(Path("train.yaml").read_text()), "save_strategy": "no", "output_dir": "new", **overrides}


def test_its_yaml_gives_its_losses(place):
    assert logged(train(settings()), "loss") == pytest.approx(LOSSES, abs=1e-4)


@pytest.mark.parametrize("form", ["hidden", "topk"])
def test_its_caches_give_its_losses(place, form):
    config = settings(teacher_cache=f"caches/{form}")
    del config["teacher_model"]
    # Top 64 of 384 entries of a random teacher leave much to the tail, which the cache spreads evenly.
    assert logged(train(config), "loss") == pytest.approx(LOSSES, abs=1e-4 if form == "hidden" else 2e-2)


def test_its_checkpoint_is_resumed_to_the_end_that_it_reached(place):
    out = train(settings(resume_from_checkpoint="run/checkpoint-2"))
    assert logged(out, "loss") == pytest.approx(LOSSES, abs=1e-4)
    ours = (out / "token_difficulty.csv").read_text().splitlines()
    theirs = Path("run/token_difficulty.csv").read_text().splitlines()
    assert ours[0].split(",")[: len(theirs[0].split(","))] == theirs[0].split(",")
    assert {line.split(",")[0] for line in ours} == {line.split(",")[0] for line in theirs}


def test_its_evaluation_scores_the_same(place):
    old = json.loads(Path("evaluated/results.json").read_text())
    shutil.rmtree("evaluated")
    done = forked(["llamafactory-cli", "eval", "eval.yaml"], cwd=place)
    assert done.returncode == 0, done.stderr
    new = json.loads(Path("evaluated/results.json").read_text())
    for name, system in old["systems"].items():
        assert new["systems"][name]["scores"] == system["scores"]
    assert keys_missing(new, old) == []


def test_its_results_folder_is_continued(place):
    done = forked(["llamafactory-cli", "eval", "eval.yaml"], cwd=place)
    assert done.returncode == 0, done.stderr
    assert Path("evaluated/report.html").is_file()


def test_its_study_trains_nothing_again_and_is_reported(place):
    models = {path: path.read_bytes() for path in Path("study").glob("cells/*/model/model.safetensors")}
    written = {path: path.stat().st_mtime_ns for path in models}
    old = json.loads(Path("study/results.json").read_text())
    done = forked(["sekd", "study", "study.yaml"], cwd=place)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in models} == written
    assert len(models) == 2
    new = json.loads(Path("study/results.json").read_text())
    assert [cell["scores"] for cell in new["cells"]] == [cell["scores"] for cell in old["cells"]]
    assert keys_missing(new, old) == []
    assert Path("study/report.html").is_file()


def keys_missing(new, old, path=""):
    """Return the keys of ``old`` that ``new`` has lost: those who read the file find what they know."""
    if isinstance(old, dict):
        lost = [f"{path}/{key}" for key in old if key not in new]
        return lost + [one for key in old if key in new for one in keys_missing(new[key], old[key], f"{path}/{key}")]
    return []
