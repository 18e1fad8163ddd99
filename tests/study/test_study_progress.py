"""What a user sees of a running study."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from rich.console import Console

from llamafactory_sekd.reporting.terminal import show_seconds
from llamafactory_sekd.study import study_progress as progress
from llamafactory_sekd.study.study_progress import View


LONG = "self_evolution_kd-kd_gamma=auto-kd_hard_scale=balanced-seed="


@pytest.fixture
def clock(monkeypatch):
    """A clock that stops until a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_in_80_columns_every_run_has_its_bar_and_long_names_stay_apart():
    text = StringIO()
    console = Console(file=text, force_terminal=True, width=80)
    with View(console, 4, 1) as view, view.running(f"{LONG}42") as first, view.running(f"{LONG}1") as second:
        first(0.25)
        second(0.75)
        view._bars.refresh()
    seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue())
    for ending, share in (("seed=42", "25%"), ("seed=1", "75%")):
        assert re.search(rf"  self_.*…\S*{ending} +[━╸╺ ]+ {share}", seen)
    assert "1/4" in seen


def test_the_time_left_counts_what_this_run_has_done_and_not_what_it_found(clock):
    text = StringIO()
    console = Console(file=text, width=100)
    with View(console, 10, 4) as view:
        with view.running("a") as report:
            report(0.5)  # half of it was there
            clock[0] += 100
            report(0.75)  # a quarter of a run in 100 s, so 400 s a run
        view.finish("a", 100.0)
        clock[0] += 100  # the other quarter
        view.say("")
        with view.running("b") as report:
            report(0.0)
    lines = [line for line in text.getvalue().splitlines() if "left" in line]
    # 5.25 runs at 400 s, then 5 at 200 s for half a run
    assert lines == ["  4 of 10 done, 48%, about 35 min left", "  5 of 10 done, 50%, about 33 min left"]


def test_a_failure_counts_as_over():
    text = StringIO()
    with View(Console(file=text, width=100), 2, 0) as view:
        view.fail("a", "status 1")
        view.finish("b", 61.0)
    assert text.getvalue().splitlines() == ["✗ a: status 1", "✓ b (1 min)"]


@pytest.mark.parametrize(("seconds", "shown"), [(4.4, "4 s"), (61, "1 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")])
def test_times_are_rounded(seconds, shown):
    assert show_seconds(seconds) == shown
