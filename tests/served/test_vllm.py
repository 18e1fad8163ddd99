"""A teacher behind vLLM's endpoint: the records of a local top-k cache, and every known way to be wrong refused."""

from __future__ import annotations

import pytest
import torch
from helpers.cached_runs import build, content, from_cache, losses
from helpers.runs import base_config
from helpers.tiny import save_dataset, save_llama
from helpers.vllm_stub import vllm_stub
from transformers import AutoTokenizer

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.host.served_teacher import build_from_server
from llamafactory_sekd.teacher.cache import Settings


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory):
    """The models, with a teacher whose head has no rows beyond the tokenizer's ids."""
    root = tmp_path_factory.mktemp("vllm")
    save_llama(root / "student", seed=1)
    used = len(AutoTokenizer.from_pretrained(root / "student"))
    save_llama(root / "teacher", seed=2, width=48, vocab_size=used)
    save_dataset(root / "data")
    return root


def test_a_cache_through_vllm_holds_what_a_local_topk_cache_does(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    settings = {"format": "topk", "k": 16, "dtype": "float32"}
    local = content(build(config, tmp_path / "local", **settings))
    with vllm_stub(tiny_root / "teacher") as url:
        build_from_server(config, tmp_path / "served", Settings(**settings), url, say=lambda _: None)
    served = content(tmp_path / "served")
    assert served.keys() == local.keys()
    for key, record in served.items():
        assert torch.equal(record["ids"], local[key]["ids"])
        torch.testing.assert_close(record["log_probs"], local[key]["log_probs"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(record["log_tail"], local[key]["log_tail"], rtol=1e-3, atol=1e-4)


def test_training_with_vllm_is_training_from_a_topk_cache(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    cache = build(config, tmp_path / "local", format="topk", k=16, dtype="float32")
    without = {key: value for key, value in config.items() if key != "teacher_model"}
    with vllm_stub(tiny_root / "teacher") as url:
        found = losses({**without, "teacher_server": url, "teacher_server_topk": 16})
    assert found == pytest.approx(losses(from_cache(config, cache)), rel=1e-4)


@pytest.mark.parametrize(
    ("fault", "k", "words"),
    [
        ("off by one", 16, "off by one"),
        ("no first", 16, "must be null"),
        ("capped", 16, "--max-logprobs 512"),
        ("logits", 16, "logits and not log-probabilities"),
        ("", 64, "greater than max allowed: 20"),
    ],
)
def test_answers_that_are_wrong_are_refused(tiny_root, tmp_path, fault, k, words):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    with vllm_stub(tiny_root / "teacher", fault=fault) as url, pytest.raises(TeacherError, match=words):
        build_from_server(config, tmp_path / "served", Settings("topk", "float32", k), url, say=lambda _: None)


def test_hidden_states_are_not_to_be_had(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    with vllm_stub(tiny_root / "teacher") as url, pytest.raises(TeacherError, match="--format topk"):
        build_from_server(config, tmp_path / "served", Settings(), url, say=lambda _: None)
