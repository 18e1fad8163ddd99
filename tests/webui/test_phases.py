"""Each phase of a run has its own bar, and a phase that is left and entered again goes on where it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamafactory_sekd.files import read_json
from llamafactory_sekd.host import run_progress
from llamafactory_sekd.host.run_progress import (
    LOADING,
    LOADING_STEPS,
    PHASE_FILE,
    Phases,
    bar_of,
    first_bar,
    forget_phase,
)
from llamafactory_sekd.webui.page import LANGUAGES, words


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The time that a run sees; ``clock.now`` is set by the test."""
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(run_progress, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def step(run: Phases, done: int, total: int = 12, epochs: int = 3) -> None:
    run.on_step_end(None, SimpleNamespace(global_step=done, max_steps=total, num_train_epochs=epochs), None)


def seen(folder: Path) -> tuple[str, int, int]:
    found = read_json(folder / PHASE_FILE)
    return found["phase"], found["done"], found["total"]


def test_loading_the_teachers_first_pass_training_and_validation_follow_each_other(tmp_path: Path, clock: Any) -> None:
    run = Phases(tmp_path)
    run.fills_cache = True
    batches = {"eval_dataloader": [None] * 3}
    found = []
    for note in (
        lambda: run.note(LOADING, 1, LOADING_STEPS),
        lambda: step(run, 0),
        lambda: step(run, 4),
        lambda: run.on_prediction_step(None, None, None, **batches),
        lambda: run.on_prediction_step(None, None, None, **batches),
        lambda: run.on_evaluate(None, SimpleNamespace(global_step=4, max_steps=12, num_train_epochs=3), None),
        lambda: step(run, 5),
        lambda: run.on_prediction_step(None, None, None, **batches),
        lambda: step(run, 12),
    ):
        clock.now += 2.0
        note()
        found.append(seen(tmp_path))
    assert found == [
        ("loading", 1, 2), ("first_pass", 0, 4), ("first_pass", 4, 4), ("validation", 1, 3), ("validation", 2, 3),
        ("first_pass", 4, 4), ("training", 5, 12), ("validation", 1, 3), ("training", 12, 12),
    ]  # fmt: skip


def test_the_time_that_is_left_is_of_the_phase_itself_and_of_what_this_run_has_done(
    tmp_path: Path, clock: Any
) -> None:
    run = Phases(tmp_path)
    step(run, 10, total=20)  # a resumed run begins at step 10
    clock.now += 4.0
    step(run, 12, total=20)
    run.on_prediction_step(None, None, None, eval_dataloader=[None] * 9)
    clock.now += 60.0  # of the validation
    step(run, 12, total=20)
    clock.now += 2.0
    step(run, 13, total=20)
    assert bar_of(tmp_path, words("en")) == {"label": "Training 13/20: 0:00:06 < 0:00:14", "value": 65.0}


def test_a_fast_phase_is_noted_once_a_second_and_at_its_end(tmp_path: Path, clock: Any) -> None:
    run = Phases(tmp_path)
    for done in range(12):
        clock.now += 0.125
        step(run, done)
    assert seen(tmp_path) == ("training", 8, 12)
    step(run, 12)
    assert seen(tmp_path) == ("training", 12, 12)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_run_that_has_noted_nothing_has_no_bar_of_its_own(language: str, tmp_path: Path) -> None:
    assert first_bar(words(language)) == {"label": f"{words(language)['phase_loading']} 0/2", "value": 0.0}
    assert bar_of(None, words(language)) is bar_of(tmp_path, words(language)) is None
    Phases(None).note(LOADING, 1, LOADING_STEPS)
    Phases(tmp_path).note(LOADING, 1, LOADING_STEPS)
    assert bar_of(tmp_path, words(language))["value"] == 50.0
    forget_phase(tmp_path)
    forget_phase(None)
    assert bar_of(tmp_path, words(language)) is None
    assert not list(tmp_path.iterdir())
