"""``sekd translate --slurm``: a script that is bash, runs one part a task, and says how they are put together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.host.translate_command import app


def translate(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["sekd", "translate", *words])
    app(args=list(words), prog_name="sekd translate", standalone_mode=False)


WORDS = ["--model", "my model", "--from", "en", "--to", "de", "--in", "mono.en.gz", "--out", "data", "--name", "mono"]


@pytest.mark.parametrize("order", [["--join", "8", "--slurm", "array.sh"], ["--slurm=array.sh", "--join=8"]])
def test_a_task_is_the_command_with_its_part_and_the_joining_command_is_told(tmp_path, monkeypatch, order):
    monkeypatch.chdir(tmp_path)
    translate(monkeypatch, *order, *WORDS)
    text = Path("array.sh").read_text()
    subprocess.run(["bash", "-n", "array.sh"], check=True)
    assert "#SBATCH --array=1-8\n" in text
    join = order[:2] if order[0] == "--join" else ["--join=8"]
    assert f"#   sekd translate {' '.join(join)} --model 'my model'" in text
    assert Path("data/mono.work/logs").is_dir()
    Path("bin").mkdir()
    Path("bin/sekd").write_text('#!/bin/bash\nprintf "%s|" "$PWD" "$@"')
    Path("bin/sekd").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    shown = subprocess.run(["bash", f"{tmp_path}/array.sh"], env=environment, cwd="/", capture_output=True, text=True)
    assert shown.stdout == "|".join([str(tmp_path), "translate", *WORDS, "--shard", "3/8", ""])


def test_without_parts_or_with_text_from_stdin_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=r"`--slurm array\.sh` needs `--join N`, the number of parts"):
        translate(monkeypatch, "--slurm", "array.sh", *WORDS)
    stdin = [word for word in WORDS if word not in ("--in", "mono.en.gz")]
    with pytest.raises(ArgumentError, match="needs `--in`, `--dataset` or `--alma`"):
        translate(monkeypatch, "--slurm", "array.sh", "--join", "8", *stdin)
    assert not Path("array.sh").exists()
