"""Which checkpoints count as complete, and that a resumed run keeps its teacher."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.runs import base_config, train, weights
from llamafactory.hparams import get_train_args
from safetensors.torch import save_file

from llamafactory_sekd.checkpoints import defect_of, find_checkpoints
from llamafactory_sekd.errors import ArgumentError, TeacherError


def save_checkpoint(output_dir: Path, step: int) -> Path:
    path = output_dir / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.ones(64, 64), "bias": torch.zeros(3)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(100)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


@pytest.mark.parametrize("damage", ["model.safetensors", "optimizer.pt", "trainer_state.json", "removed", "step"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    first, second, third = (save_checkpoint(tmp_path, step) for step in (9, 10, 100))
    assert find_checkpoints(tmp_path) == (third, {})
    if damage == "removed":
        (third / "trainer_state.json").unlink()
    elif damage == "step":
        (third / "trainer_state.json").write_text(json.dumps({"global_step": 10}))
    else:
        os.truncate(third / damage, (third / damage).stat().st_size - 1)
    (second / "trainer_state.json").unlink()
    complete, incomplete = find_checkpoints(tmp_path)
    assert (complete, list(incomplete)) == (first, [third, second])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_is_complete_only_with_every_file_of_its_runs_settings(tmp_path, name):
    checkpoint = save_checkpoint(tmp_path, 4)
    (checkpoint / name).unlink()
    assert "missing" in defect_of(checkpoint)
    assert (defect_of(checkpoint, save_only_model=True) is None) == (name != "model.safetensors")


def test_sharded_weights_are_complete_only_with_every_shard(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 4)
    (checkpoint / "model.safetensors").unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard in shards:
        save_file({"weight": torch.ones(4)}, checkpoint / shard)
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert defect_of(checkpoint) is None
    (checkpoint / shards[1]).unlink()
    assert defect_of(checkpoint) == f"{shards[1]} is missing"


def resumed(root: Path, out: Path, **keys: object) -> str | None:
    config = base_config(root, output_dir=str(out), overwrite_output_dir=False, **keys)
    return get_train_args(config)[2].resume_from_checkpoint


@pytest.mark.parametrize("asked", [True, "true", None])
def test_every_way_to_resume_takes_the_last_complete_checkpoint(tiny_root, tmp_path, asked, capsys):
    save_checkpoint(tmp_path / "out", 2)
    os.truncate(save_checkpoint(tmp_path / "out", 4) / "model.safetensors", 100)
    assert Path(resumed(tiny_root, tmp_path / "out", resume_from_checkpoint=asked)).name == "checkpoint-2"
    assert "(model.safetensors is cut off)" in capsys.readouterr().out


def test_a_named_checkpoint_that_is_incomplete_is_refused_with_the_one_to_use(tiny_root, tmp_path):
    good = save_checkpoint(tmp_path / "out", 2)
    bad = save_checkpoint(tmp_path / "out", 4)
    os.truncate(bad / "model.safetensors", 100)
    with pytest.raises(ArgumentError, match=rf"incomplete \(model.safetensors is cut off\): use {good}"):
        resumed(tiny_root, tmp_path / "out", resume_from_checkpoint=str(bad))
    with pytest.raises(ArgumentError, match="is not a folder"):
        resumed(tiny_root, tmp_path / "out", resume_from_checkpoint=str(tmp_path / "none"))


def test_resuming_where_there_is_nothing_complete_is_refused(tiny_root, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ArgumentError, match="holds no complete checkpoint"):
        resumed(tiny_root, tmp_path / "out", resume_from_checkpoint=True)


def test_a_run_that_resumes_without_an_optimizer_says_so(tiny_root, tmp_path, capsys):
    (save_checkpoint(tmp_path / "out", 2) / "optimizer.pt").unlink()
    assert resumed(tiny_root, tmp_path / "out", save_only_model=True) is not None
    assert "has no optimizer state" in capsys.readouterr().out


def test_a_finished_run_that_is_started_again_trains_no_further_step(tiny_root, tmp_path):
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "overwrite_output_dir": False}
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), **saving)
    train(config)
    before = weights(tmp_path / "out")
    results = (tmp_path / "out" / "train_results.json").read_text()
    tokens = (tmp_path / "out" / "token_difficulty.csv").read_text()
    train(config)
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 2
    after = weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "train_results.json").read_text()) == json.loads(results)
    assert (tmp_path / "out" / "token_difficulty.csv").read_text() == tokens
    assert tokens.count("\n") > 10


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


def test_without_a_complete_checkpoint_the_run_starts_from_its_beginning(tiny_root, tmp_path, capsys):
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
