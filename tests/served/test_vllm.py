"""A teacher behind vLLM's endpoint: the records of a local cache, and every known way to be wrong refused."""

from __future__ import annotations

import time

import pytest
import torch
from helpers.cached_runs import assert_same_content, build, content, from_cache, losses
from helpers.runs import base_config
from helpers.tiny import FAMILIES, save_dataset, save_llama, save_scaled_or_capped, save_tokenizer
from helpers.vllm_stub import vllm_stub
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.host.served_teacher import build_from_server, server_problem
from llamafactory_sekd.teacher.cache.cache_manifest import Settings
from llamafactory_sekd.teacher.served import vllm_hidden_states
from llamafactory_sekd.teacher.served.vllm_teacher import VllmConnection


def with_a_norm_that_matters(folder, **saving):
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.uniform_(model.base_model.norm.weight, 0.2, 3.0)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, **saving)


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory):
    """The models, with a teacher whose head has no rows beyond the tokenizer's ids."""
    root = tmp_path_factory.mktemp("vllm")
    save_llama(root / "student", seed=1)
    used = len(AutoTokenizer.from_pretrained(root / "student"))
    save_llama(root / "teacher", seed=2, width=48, vocab_size=used)
    with_a_norm_that_matters(root / "teacher", max_shard_size="50KB")
    save_dataset(root / "data")
    return root


def test_a_cache_through_vllm_holds_what_a_local_topk_cache_does(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    settings = {"format": "topk", "k": 16, "dtype": "float32"}
    local = content(build(config, tmp_path / "local", **settings))
    with vllm_stub(tiny_root / "teacher", together=2) as url:  # eight requests, several of them in flight
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


def test_hidden_states_of_a_server_that_does_not_extract_them_are_refused(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    with vllm_stub(tiny_root / "teacher") as url, pytest.raises(TeacherError, match="--format topk"):
        build_from_server(config, tmp_path / "served", Settings(), url, say=lambda _: None)


def test_a_cache_of_vllms_hidden_states_is_the_local_one_and_no_file_of_its_is_left(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    local = build(config, tmp_path / "local")
    (tmp_path / "files").mkdir()
    with vllm_stub(tiny_root / "teacher", files=tmp_path / "files") as url:
        build_from_server(config, tmp_path / "served", Settings(), url, say=lambda _: None)
        assert_same_content(tmp_path / "served", local)
        assert not list((tmp_path / "files").iterdir())
        without = {key: value for key, value in config.items() if key != "teacher_model"}
        live = losses({**without, "teacher_server": url})
    heads = [load_file(folder / "head.safetensors")["weight"] for folder in (local, tmp_path / "served")]
    assert torch.equal(*heads)
    assert live == pytest.approx(losses(from_cache(config, local)), rel=1e-5)


def offered(folder, files, patience=60.0, **stub):
    """What a connection says of its server after the probe."""
    files.mkdir()
    student = AutoTokenizer.from_pretrained(folder)
    with vllm_stub(folder, files=files, **stub) as url:
        asked = VllmConnection(url, patience, len(student))
        asked.offer_hidden_states(student, None)
        return asked.info


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scaled_or_capped_teacher_with_a_tied_head_is_exact_as_well(tmp_path, family):
    info = offered(save_scaled_or_capped(tmp_path / "teacher", family), tmp_path / "files")
    assert info.hidden
    assert info.transform is not None
    assert (info.rows, info.width, info.dtype) == (384, 32, "float32")


def test_bfloat16_explains_its_own_differences(tiny_root, tmp_path):
    assert offered(tiny_root / "teacher", tmp_path / "files", dtype=torch.bfloat16).dtype == "bfloat16"


def test_files_without_locks_are_waited_for(tiny_root, tmp_path):
    assert offered(tiny_root / "teacher", tmp_path / "files", fault="no locks").hidden


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("another layer", "the number of layers"),
        ("rows off by one", "differ by"),
        ("missing rows", "--no-enable-chunked-prefill"),
        ("other tokens", "of other tokens"),
        ("no file", "no complete file has been there"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_hidden_states_that_are_wrong_are_refused(tiny_root, tmp_path, monkeypatch, fault, words, dtype):
    monkeypatch.setattr(vllm_hidden_states, "_UNTIL_A_FILE_APPEARS", 0.3)
    with pytest.raises(TeacherError, match=words) as caught:
        offered(tiny_root / "teacher", tmp_path / "files", fault=fault, dtype=dtype)
    assert "\n" not in str(caught.value)


def test_hidden_states_of_another_model_than_the_named_one_are_refused(tiny_root, tmp_path):
    save_llama(tmp_path / "other", seed=3, width=48)
    student = AutoTokenizer.from_pretrained(tiny_root / "student")
    with vllm_stub(tiny_root / "teacher", files=tmp_path) as url:
        asked = VllmConnection(url, 60, len(student))
        with pytest.raises(TeacherError, match="differ by"):
            asked.offer_hidden_states(student, str(tmp_path / "other"))
        with pytest.raises(TeacherError, match="cannot be read on this machine"):
            asked.offer_hidden_states(student, str(tmp_path / "nothing"))


def test_the_page_says_what_is_wrong_with_a_server_without_the_patience_of_a_run(tiny_root, tmp_path):
    student = str(tiny_root / "student")
    started = time.monotonic()
    gone = server_problem("http://127.0.0.1:9", student)
    assert gone.startswith("`teacher_server: http://127.0.0.1:9` cannot be reached (")
    assert gone.endswith("start it before the run, or correct the address.")
    assert time.monotonic() - started < DistillationArguments.teacher_server_patience
    assert "use http://HOST:PORT" in server_problem("127.0.0.1:9", None)
    save_tokenizer(tmp_path / "other", vocab_size=262)
    with vllm_stub(tiny_root / "teacher") as url:
        assert server_problem(url, student) == ""
        assert server_problem(url, str(tmp_path / "not here yet")) == ""
        assert "is not the student's" in server_problem(url, str(tmp_path / "other"))
