"""A study with a teacher for each direction, through the real commands: cached once, or loaded next to the student."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import tiny
from helpers.forks import forked
from helpers.runs import base_config, logged, write_yaml

from llamafactory_sekd.study.engine import open_study
from llamafactory_sekd.study.spec import read_spec


SEKD = str(Path(sys.executable).with_name("sekd"))
SENTENCES = tiny.SENTENCES[:2]


@pytest.fixture
def place(tiny_root, tmp_path, monkeypatch):
    """A study file over two data sets, one for each direction, with a teacher for each."""
    monkeypatch.chdir(tmp_path)
    records = json.loads((tiny_root / "data" / "tiny.json").read_text())
    (tmp_path / "data").mkdir()
    for name, part in (("en_de", records[:8]), ("cs_en", records[8:16])):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(part))
    info = {name: {"file_name": f"{name}.json"} for name in ("en_de", "cs_en")}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "test").mkdir()
    for language, lines in zip(("en", "de"), zip(*SENTENCES, strict=True), strict=True):
        (tmp_path / "test" / f"en-de.{language}").write_text("".join(f"{line}\n" for line in lines))
    tiny.save_llama(tmp_path / "czech", seed=5, width=32)
    train = base_config(tiny_root, dataset="en_de,cs_en", dataset_dir="data", max_steps=2)
    train["teacher_model"] = {"en_de": str(tiny_root / "teacher"), "cs_en": "czech"}
    evaluation = {"task": "wmt22", "task_dir": "test", "directions": ["en-de"], "metrics": ["chrf"]}
    study = {
        "output_dir": "out",
        "train": str(write_yaml(tmp_path / "train.yaml", train)),
        "evaluation": str(write_yaml(tmp_path / "eval.yaml", {**evaluation, "max_new_tokens": 4})),
        "teacher_cache": "caches",
        "systems": {"Forward KD": {"kd_loss": "forward_kl"}},
        "seeds": [1],
    }
    return write_yaml(tmp_path / "study.yaml", study)


def test_cells_read_a_cache_of_each_direction_or_load_its_teacher(place):
    def cell(*overrides):
        return open_study(read_spec(place, list(overrides))).cells[0].config

    assert sorted(cell()["teacher_cache"].split(",")) == ["caches/cs_en", "caches/en_de"]
    assert "teacher_model" not in cell()
    assert set(cell("teacher_cache=null")["teacher_model"]) == {"en_de", "cs_en"}


@pytest.mark.slow
def test_a_study_with_a_teacher_of_each_direction_runs(place):
    done = forked([SEKD, "study", str(place)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (entry,) = json.loads(Path("out/results.json").read_text())["cells"]
    assert entry["scores"]["en-de"]["chrf"] is not None
    model = Path("out/cells/forward_kd-seed=1/model")
    for name in ("en_de", "cs_en"):
        assert Path("caches", name, "manifest.json").is_file()
        assert max(logged(model, f"kd/{name}/share")) > 0
    again = forked([SEKD, "study", str(place)])
    assert again.returncode == 0
    assert Path("out/logs/teacher_cache.log").read_text().count("$ ") == 1
