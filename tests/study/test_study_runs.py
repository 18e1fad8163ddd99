"""What a study runs, skips, continues and gives up, with a stand-in for the host (the command: the real one)."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from llamafactory_sekd.errors import HostError, StudyError
from llamafactory_sekd.study import running
from llamafactory_sekd.study.engine import (
    find_inputs,
    list_commands,
    open_study,
    report,
    run_one,
    run_study,
    write_slurm,
    write_study,
)
from llamafactory_sekd.study.spec import read_spec
from llamafactory_sekd.teacher.cache.cache_manifest import MANIFEST


FAKE = Path(__file__).parents[1] / "helpers" / "fake_host.py"
STUDY = {
    "output_dir": "out",
    "train": "train.yaml",
    "evaluation": "eval.yaml",
    "systems": {"A": {}, "B": {"kd_loss": "skew"}},
    "models": {"Teacher": {"model_name_or_path": "teacher"}},
    "teacher": "Teacher",
    "seeds": [1, 2],
}
TRAIN = {
    "stage": "sekd",
    "do_train": True,
    "finetuning_type": "full",
    "model_name_or_path": "student",
    "teacher_model": "teacher",
    "learning_rate": 0.001,
    "dataset_dir": "data",
    "dataset": "words",
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working directory with a study's files and the stand-in."""
    monkeypatch.chdir(tmp_path)
    Path("fake.py").write_text(FAKE.read_text())
    monkeypatch.setattr(running, "host_command", lambda *words: [sys.executable, str(tmp_path / "fake.py"), *words])
    for model in ("student", "teacher"):
        Path(model).mkdir()
        Path(model, "config.json").write_text("{}")
        Path(model, "model.safetensors").write_text(model)
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(json.dumps({"words": {"file_name": "words.json"}}))
    Path("data/words.json").write_text("[]")
    Path("test").mkdir()
    Path("test/en-de.en").write_text("The dog sleeps under the big table.\n")
    Path("test/en-de.de").write_text("Der Hund schläft unter dem großen Tisch.\n")
    evaluation = {"task": "wmt22", "task_dir": "test", "directions": ["en-de"], "metrics": ["bleu", "chrf"]}
    Path("eval.yaml").write_text(
        yaml.safe_dump({**evaluation, "systems": {"x": {"hypotheses": "x"}}, "save_dir": "x"})
    )
    Path("train.yaml").write_text(yaml.safe_dump(TRAIN))
    write(STUDY)
    return tmp_path


def write(study):
    Path("study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


def opened(*overrides):
    return open_study(read_spec(Path("study.yaml"), overrides))


def run(*overrides, jobs=1, devices=()):
    """Run the study; return the ids of what failed and what was printed."""
    text = StringIO()
    console = Console(file=text, width=200)
    return run_study(opened(*overrides), jobs=jobs, devices=devices, console=console), text.getvalue()


def starts():
    """What the stand-in was started with since the last call: (command, folder, devices)."""
    log = Path("starts.txt")
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [tuple(line.split()[:3]) for line in lines]


def names(command):
    return sorted(folder for what, folder, _ in starts() if what == command)


CELLS = ["a-seed=1", "a-seed=2", "b-seed=1", "b-seed=2"]


def test_everything_is_run_once_and_then_nothing():
    failed, _ = run()
    assert failed == []
    ran = starts()
    assert ran[0][:2] == ("eval", "teacher")
    assert sorted(folder for what, folder, _ in ran if what == "train") == CELLS
    assert [folder for what, folder, _ in ran if what == "train"][:2] == ["a-seed=1", "b-seed=1"]  # seed by seed
    failed, said = run()
    assert (failed, starts()) == ([], [])
    assert "5 of 5 done before." in said


def test_results_hold_every_cell_and_paths_that_lead_there():
    run()
    results = json.loads(Path("out/results.json").read_text())
    cell = results["cells"][0]
    assert [each["id"] for each in results["cells"]] == CELLS
    assert cell["training"] == {"seconds": 1.5, "steps": 1, "samples_per_second": 8.0, "resumed": False}
    assert cell["validation"] == {"eval_loss": 2.0, "eval_kd/ce": 1.101, "nll": 1.101}
    assert cell["scores"]["average"] == {"bleu": 10.0, "chrf": 20.0}
    assert cell["similarity"]["en-de"] == pytest.approx(100)  # the stand-in translates all alike
    assert results["models"][0]["similarity"] is None
    for path in (cell["folder"], cell["model"], cell["history"], cell["hypotheses"]["en-de"]):
        assert Path("out", path).exists()
    assert (results["directions"], results["metrics"]) == (["en-de"], ["bleu", "chrf"])
    assert results["spec"]["seeds"] == [1, 2]
    rows = list(csv.DictReader(Path("out/results.csv").read_text().splitlines()))
    assert [row["id"] for row in rows] == CELLS
    assert (rows[0]["average bleu"], rows[0]["nll"], rows[0]["seconds"]) == ("10.0", "1.101", "1.5")


def test_validation_is_that_of_the_model_that_was_saved():
    write({**STUDY, "systems": {"Last": {}, "Best": {"load_best_model_at_end": True}}, "seeds": [1]})
    run()
    for cell in ("last-seed=1", "best-seed=1"):
        path = Path("out/cells", cell, "model/trainer_state.json")
        log = [{"step": 10, "eval_kd/ce": 1.0}, {"step": 20, "eval_kd/ce": 3.0}, {"step": 20, "loss": 2.0}]
        path.write_text(json.dumps({"global_step": 20, "best_global_step": 10, "log_history": log}))
    last, best = write_study(opened(), find_inputs(opened()))["cells"]
    assert (last["validation"]["nll"], best["validation"]["nll"]) == (3.0, 1.0)


def test_checkpoints_go_and_the_log_stays():
    run()
    left = sorted(path.name for path in Path("out/cells/a-seed=1/model").iterdir())
    assert left == ["config.json", "steps.txt", "train_results.json", "trainer_log.jsonl", "trainer_state.json"]


BOTH = ["a-seed=1", "b-seed=1"]
SMALL = {**STUDY, "seeds": [1]}


@pytest.mark.parametrize(
    ("change", "trained", "evaluated"),
    [
        (lambda: write({**SMALL, "overrides": {"learning_rate": 0.5}}), BOTH, BOTH),
        (lambda: write({**SMALL, "systems": {"A": {}, "B": {"kd_loss": "forward_kl"}}}), BOTH[1:], BOTH[1:]),
        (lambda: Path("student/model.safetensors").write_text("other"), BOTH, BOTH),
        (lambda: Path("teacher/model.safetensors").write_text("other"), BOTH, [*BOTH, "teacher"]),
        (lambda: Path("data/words.json").write_text("[1]"), BOTH, BOTH),
        (lambda: rewrite("data/dataset_info.json", words={"file_name": "words.json", "ranking": True}), BOTH, BOTH),
        (lambda: Path("test/en-de.de").write_text("Der Hund ruht.\n"), [], [*BOTH, "teacher"]),
        (lambda: rewrite("eval.yaml", num_beams=4), [], [*BOTH, "teacher"]),
        (lambda: write({**SMALL, "seeds": [1, 3]}), ["a-seed=3", "b-seed=3"], ["a-seed=3", "b-seed=3"]),
    ],
    ids=["a_key", "a_system", "the_student", "the_teacher", "data", "the_data_entry", "references", "beams", "seeds"],
)
def test_what_changed_is_done_again_and_nothing_else(change, trained, evaluated):
    write(SMALL)
    run()
    starts()
    before = Path("out/cells/a-seed=1/model/config.json").stat().st_mtime_ns
    change()
    assert run()[0] == []
    ran = starts()
    assert sorted(folder for what, folder, _ in ran if what == "train") == trained
    assert sorted(folder for what, folder, _ in ran if what == "eval") == evaluated
    kept = Path("out/cells/a-seed=1/model/config.json").stat().st_mtime_ns == before
    assert kept == ("a-seed=1" not in trained)
    run()
    assert starts() == []


def test_what_decides_nothing_changes_nothing():
    write(SMALL)
    run()
    starts()
    rewrite("eval.yaml", batch_size=4)
    os.utime("student/model.safetensors", (1, 1))
    Path("student/README.md").write_text("a card")
    Path("data/others.json").write_text("[]")
    write({**SMALL, "output_dir": str(Path("out").resolve()), "baseline": "A"})
    run()
    assert starts() == []


def test_a_cache_in_the_teachers_place_counts_by_what_it_holds():
    config = {key: value for key, value in TRAIN.items() if key != "teacher_model"}
    for name in ("first", "second"):
        Path(name).mkdir()
        Path(name, MANIFEST).write_text(name)
    Path("train.yaml").write_text(yaml.safe_dump({**config, "teacher_cache": "first"}))
    write(SMALL)
    run()
    starts()
    Path("first").rename("moved")
    rewrite("train.yaml", teacher_cache="moved")
    run()
    assert starts() == []
    rewrite("train.yaml", teacher_cache="second")
    _, said = run()
    assert "a-seed=1: training.caches.1 was " in said
    assert sorted(folder for what, folder, _ in starts() if what == "train") == BOTH


def rewrite(path, **keys):
    dump = json.dumps if path.endswith(".json") else yaml.safe_dump
    Path(path).write_text(dump({**yaml.safe_load(Path(path).read_text()), **keys}))


def test_what_is_done_again_says_why():
    run()
    _, said = run("overrides.learning_rate=0.5")
    assert "a-seed=1: training.config.learning_rate was 0.001, now 0.5; it will be rerun" in said
    assert write_study(opened(), find_inputs(opened()))["cells"][0]["scores"] is None  # another study's figures


def test_another_version_of_a_package_is_another_training(monkeypatch):
    from llamafactory_sekd import fingerprints

    run()
    starts()
    monkeypatch.setattr(fingerprints.metadata, "version", lambda name: "99")
    _, said = run()
    assert "training.versions." in said
    assert names("train") == CELLS


def test_a_teacher_that_was_taken_away_leaves_what_it_taught_alone():
    run()
    starts()
    Path("teacher").rename("elsewhere")
    run()
    assert starts() == []


def test_a_failing_cell_is_one_line_and_the_others_go_on():
    failed, said = run("systems.B.fail=true")
    assert failed == ["b-seed=1", "b-seed=2"]
    (line,) = [line for line in said.splitlines() if line.startswith("✗ b-seed=1")]
    assert line.endswith("(log: out/cells/b-seed=1/train.log)")
    assert "status 3, RuntimeError: no more" in line
    results = json.loads(Path("out/results.json").read_text())
    assert [cell["scores"] is not None for cell in results["cells"]] == [True, True, False, False]
    assert results["cells"][2]["training"] is None
    starts()
    run("systems.B.fail=true")
    assert names("train") == ["b-seed=1", "b-seed=2"]  # they are tried again


def test_several_at_a_time_share_the_devices():
    assert run("systems.A.slow=30", "systems.B.slow=30", jobs=2, devices=("0", "1"))[0] == []
    ran = [(folder, device) for what, folder, device in starts() if what == "train"]
    assert {device for _, device in ran} == {"0", "1"}
    assert sorted(folder for folder, _ in ran) == CELLS


def test_two_studies_in_one_folder_are_one_too_many():
    from llamafactory_sekd.files import locked

    with (
        locked(Path("out/.lock")),
        pytest.raises(StudyError, match="Another process is at work on the study in out"),
    ):
        run()


def test_the_best_value_of_a_key_is_chosen_by_validation():
    write({**STUDY, "matrix": {"learning_rate": [0.001, 0.002, 0.003]}, "select": {"key": "learning_rate"}})
    run()
    chosen = json.loads(Path("out/results.json").read_text())["selection"]
    assert [(each["system"], each["value"]) for each in chosen] == [("A", 0.002), ("B", 0.002)]
    assert [row["value"] for row in chosen[0]["by_value"]] == [0.001, 0.002, 0.003]
    assert chosen[0]["by_value"][1] == {"value": 0.002, "mean": pytest.approx(1.0015), "seeds": 2}
    write({**STUDY, "matrix": {"learning_rate": [0.001, 0.002]}, "select": {"key": "learning_rate", "mode": "max"}})
    results = write_study(opened(), find_inputs(opened()))
    assert results["selection"][0]["value"] == 0.001


@pytest.fixture
def by_bleu():
    """A study that chooses its learning rate by BLEU on a validation set."""
    Path("valid").mkdir()
    Path("valid/en-de.en").write_text("The cat sleeps under the small table.\n")
    Path("valid/en-de.de").write_text("Die Katze schläft unter dem kleinen Tisch.\n")
    evaluation = yaml.safe_load(Path("eval.yaml").read_text())
    Path("valid.yaml").write_text(yaml.safe_dump({**evaluation, "task_dir": "valid"}))
    return {
        **STUDY,
        "seeds": [1],
        "matrix": {"learning_rate": [0.001, 0.002, 0.003]},
        "select": {"key": "learning_rate", "metric": "bleu", "evaluation": "valid.yaml"},
    }


def test_the_best_value_of_a_key_is_chosen_by_the_bleu_of_a_validation_set(by_bleu):
    write(by_bleu)
    assert run()[0] == []
    results = json.loads(Path("out/results.json").read_text())
    assert [(each["system"], each["value"], each["mode"]) for each in results["selection"]] == [
        ("A", 0.002, "max"),
        ("B", 0.002, "max"),
    ]
    assert [row["mean"] for row in results["selection"][0]["by_value"]] == pytest.approx([9.0, 10.0, 9.0])
    cell = results["cells"][0]
    assert (cell["validation"]["bleu"], cell["validation"]["nll"]) == pytest.approx((9.0, 1.101))
    assert cell["scores"]["average"] == {"bleu": 10.0, "chrf": 20.0}  # the test set's, as ever
    rows = list(csv.DictReader(Path("out/results.csv").read_text().splitlines()))
    assert (rows[0]["average bleu"], float(rows[0]["validation bleu"])) == ("10.0", pytest.approx(9.0))
    folder = Path("out/cells/a-learning_rate=0.001-seed=1")
    assert yaml.safe_load((folder / "validation.yaml").read_text())["task_dir"] == "valid"
    assert sum(what == "eval" for what, *_ in starts()) == 1 + 2 * 6  # the teacher is not chosen
    assert run()[0] == []
    assert starts() == []


def test_a_validation_set_that_is_added_later_is_all_that_is_run(by_bleu):
    write({**by_bleu, "select": {"key": "learning_rate"}})
    run()
    starts()
    write(by_bleu)
    assert run()[0] == []
    ran = starts()
    assert [what for what, *_ in ran] == ["eval"] * 6
    assert "teacher" not in [folder for _, folder, _ in ran]


def test_a_setting_is_not_chosen_on_the_test_set(by_bleu):
    write({**by_bleu, "select": {**by_bleu["select"], "evaluation": "eval.yaml"}})
    with pytest.raises(StudyError, match="holds the study's own test set of en-de"):
        run()
    assert starts() == []


def test_what_json_has_no_number_for_is_text():
    write({**STUDY, "systems": {"A": {}}, "matrix": {"kd_gamma": [float("inf"), 0.4]}, "seeds": [1]})
    assert run()[0] == []
    results = json.loads(Path("out/results.json").read_text(), parse_constant=pytest.fail)
    assert [cell["axes"]["kd_gamma"] for cell in results["cells"]] == ["inf", 0.4]
    assert yaml.safe_load(Path("out/cells/a-kd_gamma=inf-seed=1/train.yaml").read_text())["kd_gamma"] == float("inf")
    starts()
    run()
    assert starts() == []


DRIVER = """
import sys
from pathlib import Path
from rich.console import Console
from llamafactory_sekd.study import running
from llamafactory_sekd.study.engine import open_study, run_study
from llamafactory_sekd.study.spec import read_spec
running.host_command = lambda *words: [sys.executable, str(Path("fake.py").resolve()), *words]
print(run_study(open_study(read_spec(Path("study.yaml"))), jobs=2, devices=(), console=Console()))
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_any_time_it_continues_and_does_no_step_twice(place, sent):
    write({**STUDY, "overrides": {"slow": 60}})
    for after in (5, 20):  # steps of all cells together
        study = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=-3, stderr=-3)
        wait_for(lambda after=after: len(steps()) >= after)
        study.send_signal(sent)
        study.wait(1200)
        children = [int(line.split()[3]) for line in Path("starts.txt").read_text().splitlines()]
        wait_for(lambda children=children: not any(map(is_alive, children)))
        assert len(steps()) < 240
    assert run()[0] == []
    for cell in CELLS:
        done = Path("out/cells", cell, "model/steps.txt").read_text().split()
        assert sorted(set(done), key=int) == [str(step) for step in range(1, 61)]
        assert len(done) <= 60 + 2  # a step that a kill tore is done again
    assert json.loads(Path("out/cells/a-seed=1/cell.json").read_text())["resumed"]


def test_a_checkpoint_with_truncated_weights_is_passed_over_for_the_one_before(place):
    write({**STUDY, "overrides": {"slow": 60}})
    study = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=-3, stderr=-3)
    wait_for(lambda: len(steps()) >= 20)
    study.kill()
    study.wait(1200)
    children = [int(line.split()[3]) for line in Path("starts.txt").read_text().splitlines()]
    wait_for(lambda: not any(map(is_alive, children)))
    model = next(path for path in Path("out/cells").glob("*/model") if len(list(path.glob("checkpoint-*"))) > 2)
    newest, before = sorted((int(path.name[11:]) for path in model.glob("checkpoint-*")), reverse=True)[:2]
    if not (model / f"checkpoint-{newest}" / "trainer_state.json").exists():  # the kill came in between
        newest, before = before, before - 1
    (model / f"checkpoint-{newest}" / "model.safetensors").write_bytes(b"half")
    assert run()[0] == []
    done = (model / "steps.txt").read_text().split()
    assert done.count(str(newest)) == 2
    assert done.count(str(before)) == 1


def steps():
    return [line for path in Path("out/cells").glob("*/model/steps.txt") for line in path.read_text().split()]


def wait_for(condition):
    deadline = time.monotonic() + 1200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_preparations_are_run_once_and_again_when_their_text_changes():
    script = "open('prepared', 'a').write('x')"
    Path("prepare.py").write_text(script)
    write({**STUDY, "prepare": ["python prepare.py", "python prepare.py one"]})
    run()
    run()
    assert Path("prepared").read_text() == "xx"
    write({**STUDY, "prepare": ["python prepare.py two"]})
    run()
    assert Path("prepared").read_text() == "xxx"
    write({**STUDY, "prepare": ["python nowhere.py"]})
    with pytest.raises(StudyError, match=r"nowhere.py` failed: status 2, .*(log: out/logs/prepare-1.log)") as caught:
        run()
    assert "\n" not in str(caught.value)
    write({**STUDY, "prepare": ["no-such-command"]})
    with pytest.raises(HostError, match="`no-such-command` is not on the PATH"):
        run()


def test_cells_with_several_teachers_cannot_share_a_cache():
    write({**STUDY, "teacher_cache": "cache", "systems": {"A": {}, "B": {"teacher_model": "student"}}})
    with pytest.raises(StudyError, match="`teacher_cache` holds one teacher, and the cells have several"):
        run()


def test_the_cache_is_made_on_all_devices_once_per_set_of_examples(monkeypatch):
    monkeypatch.setattr(running, "tool", lambda *words: list(words))
    systems = {"A": {}, "B": {"kd_loss": "skew"}, "C": {"dataset": "others"}}
    write({**STUDY, "systems": systems, "teacher_cache": {"folder": "cache", "format": "topk", "batch_size": 4}})
    study = opened()
    options = ["--out", "cache", "--format", "topk", "--batch-size", "4"]
    for devices, launcher in (
        (("0",), ["sekd"]),
        (("0", "1"), ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "llamafactory_sekd.cli"]),
    ):
        commands = running.cache_commands(study.spec, study.cells, devices)
        assert [words for _, words in commands.values()] == [
            [*launcher, "cache", "out/teacher_cache.yaml", *options],
            [*launcher, "cache", "out/teacher_cache-2.yaml", *options],
        ]
    written = yaml.safe_load(Path("out/teacher_cache-2.yaml").read_text())
    assert (written["dataset"], written["teacher_model"]) == ("others", "teacher")
    assert "teacher_cache" not in written


def test_deepspeed_wants_torchrun_on_one_device_too(monkeypatch):
    monkeypatch.setattr(running, "tool", lambda *words: list(words))
    write({**STUDY, "overrides": {"deepspeed": "ds.json"}, "teacher_cache": "cache"})
    study = opened()
    ((_, words),) = running.cache_commands(study.spec, study.cells, ("0",)).values()
    assert words[:4] == ["torchrun", "--standalone", "--nproc-per-node", "1"]
    line = list(list_commands(opened("teacher_cache=null"), find_inputs(opened("teacher_cache=null"))))[-1]
    assert line.startswith("FORCE_TORCHRUN=1 ")


def test_a_missing_test_set_is_one_line():
    rewrite("eval.yaml", task_dir="nowhere")
    with pytest.raises(StudyError, match="nowhere is not a directory") as caught:
        run()
    assert "\n" not in str(caught.value)
    write({**STUDY, "prepare": ["sekd data alma"]})
    with pytest.raises(StudyError, match="`prepare` was not run yet: sekd data alma"):
        find_inputs(opened())


def test_one_cell_may_be_run_alone_by_name_or_number_and_the_study_collects():
    console = Console(file=StringIO())
    for chosen in ("0", "1", "b-seed=1"):
        assert run_one(opened(), chosen, devices=(), console=console) == []
    assert sorted({folder for _, folder, _ in starts()}) == ["a-seed=1", "b-seed=1", "teacher"]
    assert not Path("out/results.json").exists()
    with pytest.raises(StudyError, match=r"`--only 5`: there is no such run; `--list` has them, from 0 to 4"):
        run_one(opened(), "5", devices=(), console=console)
    run()
    assert names("train") == ["a-seed=2", "b-seed=2"]


def test_the_listed_commands_do_what_the_study_does():
    lines = list(list_commands(opened(), find_inputs(opened())))
    assert len(lines) == 5
    assert lines[1].count(" && ") == 1
    for line in lines:
        subprocess.run(line, shell=True, check=True, stdout=-3)
    starts()
    assert run()[0] == []
    assert starts() == []
    assert all(cell["scores"] for cell in json.loads(Path("out/results.json").read_text())["cells"])


def test_the_slurm_script_is_bash_and_runs_one_task(place):
    write_slurm(Path("array.sh"), ["sekd", "study", "a study.yaml", "seeds=[1,2]"], opened(), 5)
    subprocess.run(["bash", "-n", "array.sh"], check=True)
    text = Path("array.sh").read_text()
    assert "#SBATCH --array=0-4\n" in text
    assert "#SBATCH --output=out/logs/slurm-%a.log\n" in text
    assert Path("out/logs").is_dir()
    Path("bin").mkdir()
    Path("bin/sekd").write_text('#!/bin/bash\nprintf "%s|" "$PWD" "$@"')
    Path("bin/sekd").chmod(0o755)
    environment = {**os.environ, "PATH": f"{place}/bin:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    shown = subprocess.run(["bash", f"{place}/array.sh"], env=environment, cwd="/", capture_output=True, text=True)
    assert shown.stdout == f"{place}|study|a study.yaml|seeds=[1,2]|--only|3|"


@pytest.mark.parametrize("text", ["seeds=[1]\ntouch stolen", "seeds=[1]\r#SBATCH --x", "name=a\u2028b"])
def test_a_line_break_cannot_become_a_command_of_the_slurm_script(place, text):
    with pytest.raises(StudyError, match="has a line break"):
        write_slurm(Path("array.sh"), ["sekd", "study", "study.yaml", text], opened(), 5)
    assert not Path("array.sh").exists()


def test_a_study_file_with_spaces_in_its_name_is_one_word_for_slurm(place):
    Path("study.yaml").rename("my study; rm -rf x.yaml")
    study = open_study(read_spec(Path("my study; rm -rf x.yaml")))
    write_slurm(Path("array.sh"), ["sekd", "study", "study.yaml"], study, 5)
    assert "#SBATCH --job-name=my-study-rm--rf-x\n" in Path("array.sh").read_text()


def test_without_an_evaluation_the_validation_metrics_are_the_judge():
    plain = {key: value for key, value in STUDY.items() if key not in ("evaluation", "models", "teacher")}
    write({**plain, "baseline": "A"})
    assert run()[0] == []
    assert {what for what, _, _ in starts()} == {"train"}
    assert "4 of 4 done before" in run()[1]
    assert starts() == []
    results = json.loads(Path("out/results.json").read_text())
    assert (results["directions"], results["metrics"], results["test_set"]) == ([], [], None)
    assert all(cell["scores"] == {} and cell["validation"]["nll"] for cell in results["cells"])
    table = list(csv.DictReader(StringIO(Path("out/results.csv").read_text())))
    assert len(table) == 4
    assert all(float(row["nll"]) > 1 for row in table)
    written = {path.name for path in report(opened(), None)}
    assert {"report.md", "report.html", "report.tex", "results.json", "results.csv"} <= written
    text = Path("out/report.md").read_text()
    assert "## Validation" in text
    assert "names no `evaluation`" in text.replace("\\`", "`")
    assert "BLEU" not in text
    (cell, *_) = results["cells"]
    Path("out", cell["folder"], "model", "trainer_state.json").unlink()
    write_study(opened(), find_inputs(opened()))
    assert json.loads(Path("out/results.json").read_text())["cells"][0]["scores"] is None
    report(opened(), None)
    assert "1 of 4 runs are not finished" in Path("out/report.md").read_text()


def test_without_an_evaluation_a_key_is_still_chosen_by_a_validation_metric():
    plain = {key: value for key, value in STUDY.items() if key not in ("evaluation", "models", "teacher")}
    write({**plain, "matrix": {"learning_rate": [0.001, 0.002]}, "select": {"key": "learning_rate"}})
    assert run()[0] == []
    report(opened(), None)
    text = Path("out/report.md").read_text()
    assert "How learning\\_rate was chosen" in text
    assert "## Validation at equal settings" in text


def test_models_need_something_to_be_evaluated_on():
    write({key: value for key, value in STUDY.items() if key != "evaluation"})
    with pytest.raises(StudyError, match="`models` are only evaluated, so they need `evaluation`"):
        opened()
