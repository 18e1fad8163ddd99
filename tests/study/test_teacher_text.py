"""Systems that train on the teacher's translations: made once, by the real command; the training is a stand-in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from helpers.length_model import save_length_model
from helpers.sentences import ENGLISH, GERMAN
from rich.console import Console

from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.data.prompts import PARROT
from llamafactory_sekd.errors import StudyError
from llamafactory_sekd.study import running
from llamafactory_sekd.study.engine import find_inputs, list_commands, open_study, run_study
from llamafactory_sekd.study.spec import read_spec


FAKE = Path(__file__).parents[1] / "helpers" / "fake_host.py"
TRAIN = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "model_name_or_path": "teacher",
    "learning_rate": 0.001,
    "dataset_dir": "data",
    "dataset": "words",
    "eval_dataset": "words",
}
SHORT = {"max_new_tokens": 16, "filters": "none"}
STUDY = {
    "output_dir": "out",
    "train": "train.yaml",
    "evaluation": "eval.yaml",
    "systems": {"Data": {}, "Teacher's": {"text": SHORT}, "Both": {"text": SHORT, "mix": 0.5}},
    "models": {"Teacher": {"model_name_or_path": "teacher"}},
    "teacher": "Teacher",
    "seeds": [1, 2],
}
RECORDS = [PARROT.record(s, t, parse_direction("en-de")) for s, t in zip(ENGLISH, GERMAN, strict=True)]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fake.py").write_text(FAKE.read_text())
    monkeypatch.setattr(running, "host_command", lambda *words: [sys.executable, str(tmp_path / "fake.py"), *words])
    save_length_model(Path("teacher"), ENGLISH)
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(json.dumps({"words": {"file_name": "words.json"}}))
    Path("data/words.json").write_text(json.dumps(RECORDS))
    Path("test").mkdir()
    Path("test/en-de.en").write_text("The dog sleeps under the big table.\n")
    Path("test/en-de.de").write_text("Der Hund schläft unter dem großen Tisch.\n")
    evaluation = {"task": "wmt22", "task_dir": "test", "directions": ["en-de"], "metrics": ["bleu", "chrf"]}
    Path("eval.yaml").write_text(
        yaml.safe_dump({**evaluation, "systems": {"x": {"hypotheses": "x"}}, "save_dir": "x"})
    )
    Path("train.yaml").write_text(yaml.safe_dump(TRAIN))
    return tmp_path


def opened(study=STUDY):
    Path("study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return open_study(read_spec(Path("study.yaml")))


def trained_on(system):
    """Return the records of a system's training set, found as the host finds them."""
    config = yaml.safe_load(Path(f"out/cells/{system}-seed=1/train.yaml").read_text())
    folder = Path(config["dataset_dir"])
    info = json.loads((folder / "dataset_info.json").read_text())
    assert json.loads((folder / info[config["eval_dataset"]]["file_name"]).read_text()) == RECORDS
    return json.loads((folder / info[config["dataset"]]["file_name"]).read_text())


def test_text_teacher_trains_on_its_translations_and_mix_keeps_a_share_of_the_references():
    assert run_study(opened(), jobs=1, devices=(), console=Console(quiet=True)) == []
    assert trained_on("data") == RECORDS
    made = trained_on("teacher_s")
    assert [{**record, "output": ""} for record in made] == [{**record, "output": ""} for record in RECORDS]
    assert all(record["output"].startswith("wort") for record in made)
    mixed = trained_on("both")
    assert all(record in (old, new) for record, old, new in zip(mixed, RECORDS, made, strict=True))
    assert 0 < sum(record in RECORDS for record in mixed) < len(RECORDS)
    texts = sorted(path.name for path in Path("out/text").glob("*.manifest.json"))
    assert len(texts) == 2, "two seeds share a text"

    logs = {path: path.stat().st_mtime_ns for path in Path("out/logs").iterdir()}
    assert run_study(opened(), jobs=1, devices=(), console=Console(quiet=True)) == []
    assert {path: path.stat().st_mtime_ns for path in Path("out/logs").iterdir()} == logs


def test_monolingual_text_needs_no_data_set():
    Path("mono.en").write_text("".join(f"{line}\n" for line in ENGLISH[:3]))
    text = {**SHORT, "in": "mono.en", "from": "en", "to": "de", "method": "sample"}
    study = opened({**STUDY, "systems": {"Teacher's": {"text": text}}, "seeds": [1]})
    [command] = [line for line in list_commands(study, find_inputs(study)) if "translate" in line]
    assert "--in mono.en --from en --to de" in command
    assert run_study(study, jobs=1, devices=(), console=Console(quiet=True)) == []
    assert [record["input"] for record in trained_on("teacher_s")] == ENGLISH[:3]


@pytest.mark.parametrize(
    ("system", "said"),
    [
        ({"text": "student"}, "must be teacher, or options"),
        ({"mix": 0.5}, "has no effect without `text: teacher`"),
        ({"text": "teacher", "mix": 1.5}, "above 0 and at most 1"),
        ({"text": {"metod": "mbr"}}, "did you mean 'method'?"),
        ({"text": {"in": "mono.en"}, "mix": 0.5}, "needs references"),
        ({"text": "teacher", "dataset": "a,b"}, "translates one data set"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(system, said):
    with pytest.raises(StudyError, match=said.replace("?", r"\?")):
        opened({**STUDY, "systems": {"x": system}})


def test_without_a_teacher_there_is_nobody_to_translate():
    with pytest.raises(StudyError, match="needs the study's `teacher`"):
        opened({key: value for key, value in STUDY.items() if key != "teacher"})
