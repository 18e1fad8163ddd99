"""`sekd demo` through the real commands, killed in the middle of a training; and its YAML files."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers.fake_wheel import save_wheel
from helpers.runs import CLI, command

from llamafactory_sekd.config import read_config
from llamafactory_sekd.demo import data, steps
from llamafactory_sekd.evaluation.evaluation_settings import parse_settings
from llamafactory_sekd.files import locked


EXAMPLES = Path(__file__).parents[2] / "examples"
YAMLS = EXAMPLES / "yamls"
TRAININGS = {path.stem: yaml.safe_load(path.read_text()) for path in YAMLS.glob("demo_s*.yaml")} | {
    "demo_forward_kl": yaml.safe_load((YAMLS / "demo_forward_kl.yaml").read_text())
}
STUDENTS = ("demo_sft_student", "demo_forward_kl", "demo_sekd")
# The demo as it is, with another wheel, less text and shorter trainings.
DRIVER = """
import sys
from functools import partial
from pathlib import Path
from llamafactory_sekd.demo import data, steps
data.SHA256 = sys.argv.pop(1)
data.split_pairs = partial(data.split_pairs, test_size=30, valid_size=10, student_size=60)
steps.example_folder = lambda: Path("examples")
from llamafactory_sekd.cli import main
main()
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a wheel of made-up pairs and the demo's YAML files for six steps, one seed and short outputs."""
    pairs = {str(n): (f"red{n} lamp{n} turn{n} now{n}", f"Lampe{n} rot{n} jetzt{n} an{n}") for n in range(250)}
    english, german = ({key: pair[side] for key, pair in pairs.items()} for side in (0, 1))
    save_wheel(tmp_path / "wheel", {"lamp": (english, german)})
    for name in ("yamls", "studies"):
        (tmp_path / "examples" / name).mkdir(parents=True)
    short = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "eval_strategy": "no", "do_eval": False}
    for name, config in TRAININGS.items():
        (tmp_path / "examples" / "yamls" / f"{name}.yaml").write_text(yaml.safe_dump({**config, **short}))
    evaluation = yaml.safe_load((YAMLS / "demo_eval.yaml").read_text())
    (tmp_path / "examples" / "yamls" / "demo_eval.yaml").write_text(
        yaml.safe_dump({**evaluation, "max_new_tokens": 4})
    )
    study = yaml.safe_load((EXAMPLES / "studies" / steps.STUDY).read_text())
    (tmp_path / "examples" / "studies" / steps.STUDY).write_text(yaml.safe_dump({**study, "seeds": [1]}))
    return tmp_path


def demo_command(folder, *options):
    sha256 = hashlib.sha256((folder / "wheel" / data.WHEEL).read_bytes()).hexdigest()
    return [sys.executable, "-c", DRIVER, sha256, "demo", "--offline", "wheel", "--work", "elsewhere", *options]


@pytest.mark.slow
def test_a_killed_demo_continues_from_its_last_checkpoint_and_does_nothing_twice(folder):
    command = demo_command(folder, "--prepare")
    options = {"cwd": folder, "text": True, "stderr": subprocess.STDOUT}
    teacher = folder / "elsewhere" / "models" / "teacher"

    run = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
    deadline = time.monotonic() + 1200
    while not (teacher / "checkpoint-4" / "trainer_state.json").exists() and run.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (folder / "elsewhere" / "models" / "student_init").exists()

    again = subprocess.run(command, stdout=subprocess.PIPE, check=False, **options)
    assert again.returncode == 0, again.stdout
    assert "(done before)" in again.stdout
    assert re.search(
        r"\$ .*llamafactory-cli train elsewhere/yamls/demo_sft_teacher\.yaml resume_from_checkpoint=", again.stdout
    )
    state = json.loads((teacher / "trainer_state.json").read_text())
    assert (state["global_step"], [entry["step"] for entry in state["log_history"] if "loss" in entry]) == (
        6,
        [1, 2, 3, 4, 5, 6],
    )
    assert (folder / "elsewhere" / "models" / "student_init" / "model.safetensors").exists()

    third = subprocess.run(command, stdout=subprocess.PIPE, check=True, **options)
    assert third.stdout.count("(done before)") == 4
    assert not (folder / "demo").exists()
    assert "$" not in third.stdout


@pytest.mark.slow
def test_the_complete_demo_tells_its_own_figures_and_a_second_run_does_nothing_twice(folder):
    options = {"cwd": folder, "text": True, "stderr": subprocess.STDOUT, "stdout": subprocess.PIPE, "check": False}
    first = subprocess.run(demo_command(folder), **options)
    assert first.returncode == 0, first.stdout

    results = json.loads((folder / "elsewhere" / "study" / "results.json").read_text())
    assert {cell["system"] for cell in results["cells"]} == set(results["spec"]["systems"])
    page = (folder / "elsewhere" / "report.html").read_text(encoding="utf-8")
    for said in ("60 pairs", "In 40 %", "the references of unrelated sentences", "30 held-out sentences"):
        assert said in page
    assert page.count("data:image") == 3  # hard tokens, right and wrong references, scores
    assert "<script" not in page
    teacher = next(model for model in results["models"] if model["name"] == "Teacher")["scores"]["en-de"]["chrf"]
    assert f"{teacher:.2f}" in page

    written = (folder / "elsewhere" / "report.html").stat().st_mtime_ns
    second = subprocess.run(demo_command(folder), **options)
    assert second.returncode == 0, second.stdout
    assert second.stdout.count("(done before)") == 6
    assert "$" not in second.stdout
    assert (folder / "elsewhere" / "report.html").stat().st_mtime_ns == written
    assert not (folder / "demo").exists()


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path):
    with locked(tmp_path / ".lock"):
        done = command([str(Path(CLI).with_name("sekd")), "demo", "--work", str(tmp_path)])
    assert done.returncode == 2
    assert re.search(r"^sekd demo: error: Another demo is at work in .*--work\)\.$", done.stderr, re.MULTILINE)


def test_the_students_are_trained_alike_but_for_their_objective():
    students = [dict(TRAININGS[name]) for name in STUDENTS]
    for config in students:
        for key in ("stage", "output_dir", "teacher_model", "kd_loss", "kd_lambda", "kd_beta", "kd_gamma"):
            config.pop(key, None)
    assert students[0] == students[1] == students[2]
    study = yaml.safe_load((EXAMPLES / "studies" / steps.STUDY).read_text())
    assert {key for system in study["systems"].values() for key in system} == {"train", "kd_lambda", "text"}


def test_the_yaml_files_name_what_the_demo_makes():
    places = steps.Places(Path(steps.HOME))
    prepared = [str(places.model(name)) for name in ("teacher_init", "teacher", "student_init")]
    for name, config in TRAININGS.items():
        text = data.TEACHER if name == "demo_sft_teacher" else data.TRAIN
        assert config["overwrite_output_dir"] is False  # the same command continues an interrupted run
        assert config["dataset_dir"] == str(places.data)
        assert (config["dataset"], config["eval_dataset"]) == (text, data.VALID)
        assert config["model_name_or_path"] in prepared
        assert config.get("teacher_model", str(places.model("teacher"))) in prepared
    assert TRAININGS["demo_sft_teacher"]["output_dir"] == str(places.model("teacher"))
    settings = parse_settings(yaml.safe_load((YAMLS / "demo_eval.yaml").read_text()), "demo_eval.yaml")
    models = {system.name: system.model["model_name_or_path"] for system in settings.systems}
    assert set(models.values()) <= set(prepared)
    assert (settings.task, settings.task_dir) == (data.TASK, places.data)


def test_all_of_the_demo_can_be_moved_to_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    spec = steps.write_yamls(tmp_path / "d")
    written = "".join(path.read_text() for path in (tmp_path / "d" / "yamls").glob("*.yaml"))
    assert not re.search(r"(?<![\w/.])demo/", written)
    assert spec.output_dir == tmp_path / "d" / "study"
    assert spec.train == tmp_path / "d" / "yamls" / "demo_sekd.yaml"
    assert read_config(spec.train)["teacher_model"] == str(tmp_path / "d" / "models" / "teacher")
