"""Which checkpoints count as whole, and that a resumed run keeps its teacher."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.runs import base_config, train
from llamafactory.hparams import get_train_args
from safetensors.torch import save_file

from llamafactory_sekd.checkpoints import find_checkpoints
from llamafactory_sekd.errors import TeacherError


def save_checkpoint(output_dir: Path, step: int) -> Path:
    path = output_dir / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.ones(64, 64), "bias": torch.zeros(3)}, path / "model.safetensors")
    torch.save({"state": torch.ones(100)}, path / "optimizer.pt")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


@pytest.mark.parametrize("damage", ["model.safetensors", "optimizer.pt", "trainer_state.json", "removed", "step"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    first, second, third = (save_checkpoint(tmp_path, step) for step in (9, 10, 100))
    assert find_checkpoints(tmp_path) == (third, [])
    if damage == "removed":
        (third / "trainer_state.json").unlink()
    elif damage == "step":
        (third / "trainer_state.json").write_text(json.dumps({"global_step": 10}))
    else:
        os.truncate(third / damage, (third / damage).stat().st_size - 1)
    (second / "trainer_state.json").unlink()
    assert find_checkpoints(tmp_path) == (first, [third, second])


@pytest.mark.parametrize("stage", ["sekd", "sft"])
def test_only_our_stage_chooses_the_checkpoint(tiny_root, tmp_path, stage, capsys):
    save_checkpoint(tmp_path / "out", 2)
    (save_checkpoint(tmp_path / "out", 4) / "trainer_state.json").unlink()
    teacher = {} if stage == "sekd" else {"teacher_model": None}
    config = base_config(
        tiny_root, output_dir=str(tmp_path / "out"), overwrite_output_dir=False, stage=stage, **teacher
    )
    chosen = get_train_args(config)[2].resume_from_checkpoint
    assert Path(chosen).name == ("checkpoint-2" if stage == "sekd" else "checkpoint-4")
    assert ("checkpoint-4" in capsys.readouterr().out) == (stage == "sekd")


def test_without_a_whole_checkpoint_the_run_starts_from_its_beginning(tiny_root, tmp_path, capsys):
    (save_checkpoint(tmp_path / "out", 4) / "trainer_state.json").unlink()
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), overwrite_output_dir=False)
    assert get_train_args(config)[2].resume_from_checkpoint is None
    assert "the training starts from its beginning" in capsys.readouterr().out


def test_a_run_does_not_resume_with_another_teacher(tiny_root, tmp_path):
    for name in ("student", "data"):
        (tmp_path / name).symlink_to(tiny_root / name)
    tiny.save_llama(tmp_path / "teacher", seed=1)
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "overwrite_output_dir": False}
    config = base_config(tmp_path, output_dir=str(tmp_path / "out"), **saving)
    train(config)
    longer = {**config, "max_steps": 3}
    tiny.save_llama(tmp_path / "teacher", seed=7)
    with pytest.raises(TeacherError, match=r"is not the teacher that .*checkpoint-2 was trained with"):
        train(longer)
    tiny.save_llama(tmp_path / "teacher", seed=1)  # brought back
    train(longer)
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
