"""A teacher whose files vanish or were cut is named in one line, before a step is done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from helpers.runs import base_config, train

from llamafactory_sekd.errors import TeacherError


@pytest.fixture
def root(tmp_path, tiny_root) -> Path:
    for name in ("student", "data"):
        (tmp_path / name).symlink_to(tiny_root / name)
    shutil.copytree(tiny_root / "teacher", tmp_path / "teacher")
    return tmp_path


@pytest.mark.parametrize("damage", ["folder", "weights", "half of the weights", "header", "tokenizer", "config"])
def test_a_teacher_whose_files_are_gone_or_cut_is_named(root, damage):
    folder = root / "teacher"
    weights = folder / "model.safetensors"
    if damage == "folder":
        shutil.rmtree(folder)
    elif damage == "weights":
        weights.unlink()
    elif damage == "half of the weights":
        os.truncate(weights, weights.stat().st_size // 2)
    elif damage == "header":
        os.truncate(weights, 20)
    elif damage == "config":
        (folder / "config.json").unlink()
    else:
        for path in folder.glob("token*"):
            path.unlink()
    with pytest.raises(TeacherError) as caught:
        train(base_config(root, output_dir=str(root / "out")))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((root / "out").glob("checkpoint-*"))
