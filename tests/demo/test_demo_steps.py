"""The demo's chain of steps: what is done once, what is done again, and what a kill leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from llamafactory_sekd import checkpoints, children
from llamafactory_sekd.demo import steps
from llamafactory_sekd.demo.steps import Progress, RemainingTime, Step, run_steps
from llamafactory_sekd.errors import HostError
from llamafactory_sekd.reporting.terminal import show_seconds


class Chain:
    """Three steps in a row that write files; `ran` lists what has run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: list[str] = []
        self.ingredients = {"a": "1", "b": "1", "c": "1"}

    def run(self) -> list[str]:
        steps = [
            Step(name, f"Step {name}", 1, self.action(name), (self.folder / name,), self.ingredients[name], needs)
            for name, needs in (("a", ()), ("b", ("a",)), ("c", ("b",)))
        ]
        self.ran = []
        run_steps(steps, self.folder / ".steps", Progress(Console(quiet=True)))
        return self.ran

    def action(self, name: str):
        def act(report) -> None:
            self.ran.append(name)
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(self.ingredients[name])
            report(1.0)

        return act


def test_a_finished_chain_does_nothing_the_second_time(tmp_path):
    chain = Chain(tmp_path)
    assert chain.run() == ["a", "b", "c"]
    assert chain.run() == []


def test_a_changed_ingredient_renews_the_step_and_all_that_builds_on_it(tmp_path):
    chain = Chain(tmp_path)
    chain.run()
    chain.ingredients["b"] = "2"

    assert chain.run() == ["b", "c"]
    assert (tmp_path / "b").read_text() == "2"  # the old output was removed first


def test_a_lost_output_is_made_again(tmp_path):
    chain = Chain(tmp_path)
    chain.run()
    (tmp_path / "c").unlink()
    assert chain.run() == ["c"]


def test_an_interrupted_step_finds_what_it_left_and_a_changed_one_does_not(tmp_path):
    chain = Chain(tmp_path)
    act = chain.action("b")

    def interrupted(report) -> None:
        act(report)
        raise KeyboardInterrupt

    chain.action = lambda name: interrupted if name == "b" else Chain.action(chain, name)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        chain.run()
    del chain.action

    assert chain.run() == ["b", "c"]
    assert (tmp_path / "b").read_text() == "11"


WORKER = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "pid").write_text(str(os.getpid()))
progress = folder / "progress"
done = len(progress.read_text()) if progress.exists() else 0
for _ in range(done, 40):
    with open(progress, "a") as file:
        file.write(".")
    time.sleep(0.05)
"""
DRIVER = """
import sys
from pathlib import Path
from rich.console import Console
from llamafactory_sekd.children import run_child
from llamafactory_sekd.files import locked
from llamafactory_sekd.demo.steps import Progress, Step, run_steps
folder = Path(sys.argv[1])
out = folder / "out"
def work(report):
    out.mkdir(exist_ok=True)
    command = [sys.executable, str(folder / "worker.py"), str(out)]
    run_child(command, folder / "log", lambda: 0.5, report, environment={})
with locked(folder / ".lock"):
    run_steps([Step("work", "Work", 2, work, (out,), "same")], folder / ".steps", Progress(Console()))
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_takes_its_child_along_and_the_next_one_continues(tmp_path, sent):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    progress = tmp_path / "out" / "progress"
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: progress.exists() and len(progress.read_text()) >= 3)
    run.send_signal(sent)
    run.wait()

    wait_for(lambda: not is_alive(int((tmp_path / "out" / "pid").read_text())))
    done = len(progress.read_text())
    assert 3 <= done < 40
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "✓ Work" in again.stdout
    assert len(progress.read_text()) == 40  # every piece of work was done once
    third = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "done before" in third.stdout


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_failing_child_shows_its_last_lines_and_its_log(tmp_path):
    script = "import sys; [print('line', n) for n in range(30)]; sys.exit(3)"
    with pytest.raises(HostError) as caught:
        children.run_child(
            [sys.executable, "-c", script],
            tmp_path / "logs" / "x.log",
            lambda: 0.0,
            lambda share: None,
            environment={},
        )

    message = str(caught.value)
    assert "line 29" in message
    assert "line 3\n" not in message
    assert f"(status 3): its complete log is {tmp_path / 'logs' / 'x.log'}." in message
    log = (tmp_path / "logs" / "x.log").read_text()
    assert log.startswith("$ ")
    assert "line 3\n" in log


def test_a_training_says_how_far_it_is(tmp_path):
    log = tmp_path / "trainer_log.jsonl"
    assert checkpoints.share_of_training(tmp_path) == 0
    log.write_text('{"current_steps": 10, "total_steps": 40}\n{"current_steps": 20, "total_steps": 40}\n')
    assert checkpoints.share_of_training(tmp_path) == 0.5
    log.write_text('{"current_steps": 10, "total_steps": 40}\n{"current_st')  # caught while it is written
    assert checkpoints.share_of_training(tmp_path) == 0


def test_another_folder_moves_every_path_of_a_yaml_file_and_nothing_else():
    config = {
        "stage": "sekd",
        "output_dir": "demo/models/x",
        "systems": {"a": {"model_name_or_path": "demo/models/a"}},
    }
    assert steps.moved(config, "demo", Path("demo")) == config
    assert steps.moved(config, "demo", Path("/data/d")) == {
        "stage": "sekd",
        "output_dir": "/data/d/models/x",
        "systems": {"a": {"model_name_or_path": "/data/d/models/a"}},
    }


def test_commands_run_on_the_cores_there_are_and_one_gpu_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert steps.environment()["OMP_NUM_THREADS"] == "2"
    assert steps.environment()["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert steps.environment()["CUDA_VISIBLE_DEVICES"] == "3"


def test_the_remaining_time_follows_the_machines_pace_and_ignores_what_was_done_before():
    clock = [0.0]
    remaining = RemainingTime(100, now=lambda: clock[0])
    assert remaining.estimate() == 100
    remaining.credit(20)
    assert remaining.estimate() == 80
    clock[0] = 40.0  # twenty planned seconds took forty
    remaining.work(20)
    assert remaining.estimate() == 120


@pytest.mark.parametrize(
    ("seconds", "shown"), [(4.4, "4 s"), (59.4, "59 s"), (61, "1 min"), (96, "1 min 40 s"), (600, "10 min")]
)
def test_times_are_rounded_as_people_say_them(seconds, shown):
    assert show_seconds(seconds) == shown
