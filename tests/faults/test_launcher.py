"""A rank is bound to its launcher, a training without one to nothing; other stages start torchrun as the host does."""

from __future__ import annotations

import subprocess
import sys
from types import FunctionType

import pytest

from llamafactory_sekd.host import launcher


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal on a parent's death is Linux's")
BOUND = """
import ctypes, os, subprocess, sys
from llamafactory_sekd.children import end_rank_with_launcher
end_rank_with_launcher()
signal = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(signal))  # PR_GET_PDEATHSIG
print(signal.value)
"""


@pytest.mark.parametrize(("environment", "signal"), [({}, 0), ({"TORCHELASTIC_RUN_ID": "none"}, 9)])
def test_only_a_rank_that_was_launched_ends_with_its_parent(environment, signal):
    result = subprocess.run([sys.executable, "-c", BOUND], env=environment, capture_output=True, text=True, check=True)
    assert int(result.stdout) == signal


@pytest.mark.parametrize(("stage", "bound"), [("sekd", True), ("sft", False)])
def test_torchrun_is_bound_to_the_command_in_our_stage_alone(monkeypatch, tmp_path, stage, bound):
    (tmp_path / "run.yaml").write_text(f"stage: {stage}\n")
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "train", str(tmp_path / "run.yaml")])
    seen: list[bool] = []
    names = {"subprocess": subprocess, "seen": seen}
    exec("def host_launch(): seen.append('preexec_fn' in getattr(subprocess.run, 'keywords', {}))", names)
    host_launch = names["host_launch"]
    assert isinstance(host_launch, FunctionType)
    launcher.extend_launch(host_launch)()
    assert seen == [bound]
    assert names["subprocess"] is subprocess
