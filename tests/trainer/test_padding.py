"""Rows of a head that no token means: read as the model reads them, unless the teacher's are not finite."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.forks import forked
from helpers.runs import base_config, logged, train, weights, write_yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM

from llamafactory_sekd.teacher import used_ids


@pytest.fixture(scope="module")
def root(tiny_root, tmp_path_factory):
    """The tiny student with a teacher whose head has a bias (Phi), -inf at the ids that no token means."""
    root = tmp_path_factory.mktemp("padded")
    for name in ("student", "data"):
        (root / name).symlink_to(tiny_root / name)
    tokenizer = AutoTokenizer.from_pretrained(tiny_root / "student")
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    model = PhiForCausalLM(config)
    with torch.no_grad():
        model.lm_head.bias[used_ids(tokenizer) :] = -torch.inf
    model.save_pretrained(root / "teacher")
    for path in (tiny_root / "student").iterdir():
        if "token" in path.name:
            shutil.copy(path, root / "teacher" / path.name)
    return root


def run(root, out, **keys):
    return train(base_config(root, output_dir=str(out), **keys))


def test_infinite_padding_is_cut_and_reverse_kl_learns(root, tmp_path, said):
    run(root, tmp_path / "out", kd_loss="reverse_kl")
    losses = logged(tmp_path / "out", "loss")
    assert all(0 < loss < 100 for loss in losses)
    assert losses[-1] < losses[0]
    used = used_ids(AutoTokenizer.from_pretrained(root / "student"))
    assert f"the objective reads the first {used} of both" in said.text


def test_the_cut_run_is_that_of_a_teacher_with_a_head_of_the_tokenizers_size(root, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(root, small)
    tensors = load_file(small / "teacher" / "model.safetensors")
    used = used_ids(AutoTokenizer.from_pretrained(root / "student"))
    tensors = {name: value[:used].clone() if len(value) == 384 else value for name, value in tensors.items()}
    save_file(tensors, small / "teacher" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((small / "teacher" / "config.json").read_text())
    (small / "teacher" / "config.json").write_text(json.dumps({**config, "vocab_size": used}))
    run(root, tmp_path / "a")
    run(small, tmp_path / "b")
    assert logged(tmp_path / "a", "loss") == pytest.approx(logged(tmp_path / "b", "loss"), abs=1e-4)


def test_a_cached_run_decides_as_the_online_one(root, tmp_path):
    config = base_config(root, output_dir=str(tmp_path / "online"), kd_loss="reverse_kl")
    path = str(write_yaml(tmp_path / "x.yaml", config))
    made = forked(["sekd", "cache", path, "--out", str(tmp_path / "cache")])
    assert made.returncode == 0, made.stderr[-2000:]
    train(config)
    run(root, tmp_path / "cached", kd_loss="reverse_kl", teacher_model=None, teacher_cache=str(tmp_path / "cache"))
    assert logged(tmp_path / "cached", "loss") == pytest.approx(logged(tmp_path / "online", "loss"), abs=1e-4)
    for name, value in weights(tmp_path / "online").items():
        torch.testing.assert_close(weights(tmp_path / "cached")[name], value, atol=1e-5, rtol=1e-5)


def test_an_impossible_token_that_is_a_real_one_is_told_where_the_loss_is_infinite(root, tmp_path, said):
    broken = tmp_path / "broken"
    shutil.copytree(root, broken)
    tensors = load_file(broken / "teacher" / "model.safetensors")
    tensors["lm_head.bias"][7] = -torch.inf
    save_file(tensors, broken / "teacher" / "model.safetensors", metadata={"format": "pt"})
    run(broken, tmp_path / "out", kd_loss="reverse_kl", max_steps=2)
    assert "is not finite: the weights no longer improve" in said.text
