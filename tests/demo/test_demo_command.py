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
from llamafactory_sekd.demo import data, plan, surroundings
from llamafactory_sekd.evaluation.settings import parse_settings
from llamafactory_sekd.files import locked


YAMLS = Path(__file__).parents[2] / "examples" / "yamls"
TRAININGS = {name: yaml.safe_load((YAMLS / file).read_text()) for name, (file, _) in plan.TRAININGS.items()}
# The demo as it is, with another wheel and shorter trainings.
DRIVER = """
import sys
from pathlib import Path
from llamafactory_sekd.demo import data, plan
data.SHA256 = sys.argv.pop(1)
plan.yaml_folder = lambda: Path("yamls")
from llamafactory_sekd.cli import main
main()
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a wheel of 1,400 made-up pairs and the demo's YAML files for six steps instead of thousands."""
    pairs = {
        f"{number}": (f"Turn on lamp {number} now", f"Lampe {number} jetzt einschalten") for number in range(1400)
    }
    english, german = ({key: pair[side] for key, pair in pairs.items()} for side in (0, 1))
    save_wheel(tmp_path / "wheel", {"lamp": (english, german)})
    (tmp_path / "yamls").mkdir()
    for name, (file, _) in plan.TRAININGS.items():
        short = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "eval_strategy": "no", "do_eval": False}
        (tmp_path / "yamls" / file).write_text(yaml.safe_dump({**TRAININGS[name], **short}))
    return tmp_path


@pytest.mark.slow
def test_a_killed_demo_continues_from_its_last_checkpoint_and_does_nothing_twice(folder):
    sha256 = hashlib.sha256((folder / "wheel" / data.WHEEL).read_bytes()).hexdigest()
    command = [sys.executable, "-c", DRIVER, sha256, "demo", "--prepare", "--offline", "wheel", "--work", "elsewhere"]
    options = {"cwd": folder, "text": True, "stderr": subprocess.STDOUT}
    teacher = folder / "elsewhere" / "models" / "teacher"

    run = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
    deadline = time.monotonic() + 300
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
        r"\$ .*llamafactory-cli train yamls/demo_sft_teacher\.yaml .*resume_from_checkpoint=", again.stdout
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


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path):
    with locked(tmp_path / ".lock"):
        done = command([str(Path(CLI).with_name("sekd")), "demo", "--work", str(tmp_path)])
    assert done.returncode == 2
    assert re.search(r"^sekd demo: error: Another demo is at work in .*--work\)\.$", done.stderr, re.MULTILINE)


def test_the_three_students_are_trained_alike_but_for_their_objective():
    students = [dict(TRAININGS[name]) for name in plan.STUDENTS]
    for config in students:
        for key in ("stage", "output_dir", "teacher_model", "kd_loss", "kd_lambda", "kd_beta", "kd_gamma"):
            config.pop(key, None)
    assert students[0] == students[1] == students[2]


def test_the_yaml_files_name_what_the_demo_makes():
    prepared = [f"demo/models/{name}" for name in ("teacher_init", "teacher", "student_init")]
    places = plan.Places(Path(plan.HOME))
    for name, config in TRAININGS.items():
        assert config["output_dir"] == str(places.model(name))
        assert config["overwrite_output_dir"] is False  # the same command continues an interrupted run
        assert config["dataset_dir"] == str(places.data)
        assert (config["dataset"], config["eval_dataset"]) == (data.TRAIN, data.VALID)
        assert config["model_name_or_path"] in prepared
        assert config.get("teacher_model", str(places.model("teacher"))) in prepared
        assert config["plot_loss"]
    settings = parse_settings(yaml.safe_load((YAMLS / plan.EVALUATION).read_text()), plan.EVALUATION)
    models = {system.name: system.model["model_name_or_path"] for system in settings.systems}
    assert models == {
        "student_untrained": str(places.model("student_init")),
        **{name: str(places.model(name)) for name in (*plan.STUDENTS, "teacher")},
    }
    assert (settings.task, settings.task_dir, settings.save_dir) == (data.TASK, places.data, places.evaluation)


def test_the_evaluation_can_be_moved_to_another_folder():
    path = YAMLS / plan.EVALUATION
    moved = read_config(path, surroundings.moved(read_config(path), plan.HOME, Path("/data/d")))
    assert "demo/" not in json.dumps(moved)
    assert moved["systems"]["teacher"] == {"model_name_or_path": "/data/d/models/teacher"}
