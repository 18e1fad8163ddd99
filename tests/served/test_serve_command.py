"""`sekd serve` over real HTTP: exact answers, and one line for whatever it cannot answer."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from helpers.forks import forked
from helpers.runs import command
from helpers.servers import SEKD, serving
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.teacher.served import service
from llamafactory_sekd.teacher.served.connection import Connection
from llamafactory_sekd.teacher.served.protocol import ServerInfo
from llamafactory_sekd.teacher.served.service import make_app


IDS = [0, 5, 9, 44, 101, 7, 300, 1]


@pytest.fixture(scope="module")
def server(tiny_root):
    with serving(tiny_root / "teacher") as running:
        yield running


@pytest.fixture(scope="module")
def model(tiny_root):
    return AutoModelForCausalLM.from_pretrained(tiny_root / "teacher").eval()


def question(server, **changes):
    asked = {
        "teacher": server.get("/v1/info").json()["fingerprint"],
        "format": "hidden",
        "dtype": "float32",
        "sequences": [{"ids": IDS, "runs": [[3, 7]]}],
    }
    return {**asked, **changes}


def test_head_times_hidden_states_are_the_models_logits(server, model):
    answer = load(server.ask(question(server)).content)["hidden"]
    head = load(server.get("/v1/head").content)["weight"]
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, 3:7]
    torch.testing.assert_close(answer @ head.T, logits, rtol=1e-5, atol=1e-5)


def test_topk_are_the_largest_log_probabilities_and_the_mass_of_the_others(server, model):
    asked = question(server, format="topk", k=8, vocab_size=300)
    record = load(server.ask(asked).content)
    with torch.no_grad():
        logs = model(torch.tensor([IDS])).logits[0, 3:7, :300].log_softmax(-1)
    top, ids = logs.topk(8)
    assert record["ids"].tolist() == ids.tolist()
    torch.testing.assert_close(record["log_probs"], top, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(record["log_tail"].exp(), 1 - top.exp().sum(-1), rtol=1e-4, atol=1e-5)


def test_questions_that_share_a_forward_pass_get_their_own_answers(server):
    sequences = [{"ids": [0, *range(3, 6 + n), 1], "runs": [[1, 2 + n % 3]]} for n in range(24)]
    alone = [load(server.ask(question(server, sequences=[one], together=False)).content) for one in sequences]
    with ThreadPoolExecutor(24) as pool:
        asked = pool.map(lambda one: server.ask(question(server, sequences=[one])).content, sequences)
        for data, expected in zip(asked, alone, strict=True):
            torch.testing.assert_close(load(data)["hidden"], expected["hidden"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"sequences": [{"ids": [0, 9999], "runs": [[0, 1]]}]}, 422, "token id 9999"),
        ({"sequences": [{"ids": [0, -1], "runs": [[0, 1]]}]}, 422, "token id -1"),
        ({"sequences": [{"ids": [3] * 5000, "runs": [[0, 1]]}]}, 422, "5000 tokens"),
        ({"sequences": [{"ids": IDS, "runs": [[3, 8]]}]}, 422, "[3, 8]"),
        ({"sequences": [{"ids": IDS, "runs": [[3, 5], [4, 6]]}]}, 422, "[4, 6]"),
        ({"sequences": []}, 400, "sequences"),
        ({"sequences": [{"ids": ["a", 2], "runs": [[0, 1]]}]}, 400, "sequences.0.ids.0"),
        ({"format": "logits"}, 422, "logits"),
        ({"format": "topk", "k": 4, "vocab_size": 300}, 422, "4"),
        ({"format": "topk", "k": 8, "vocab_size": 30000}, 422, "30000"),
        ({"teacher": "another"}, 409, "another"),
        ({"extra": 1}, 400, "extra"),
    ],
)
def test_a_bad_question_is_one_line_and_ends_nothing(server, changes, status, words):
    answer = server.ask(question(server, **changes))
    line = answer.json()["error"]
    assert (answer.status_code, "\n" in line, words in line) == (status, False, True), line
    assert server.ask(question(server)).status_code == 200


def test_what_is_no_question_at_all_is_refused_in_one_line(server):
    url = f"{server.url}/v1/answers"
    json = {"Content-Type": "application/json"}
    for given, status in (({"content": b"{", "headers": json}, 400), ({"content": b"{}"}, 415)):
        answer = httpx.post(url, **given, timeout=1200, trust_env=False)
        assert answer.status_code == status
        assert "\n" not in answer.json()["error"]
    large = httpx.post(url, content=b" " * (65 * 2**20), headers=json, timeout=1200, trust_env=False)
    assert large.status_code == 413
    assert server.get("/v1/nothing").status_code == 404


def test_progress_and_counters_grow_with_what_was_answered(server):
    before = server.get("/v1/progress").json()
    server.ask(question(server))
    after = server.get("/v1/progress").json()
    assert after["questions"] == before["questions"] + 1
    assert after["response_tokens"] == before["response_tokens"] + 4
    assert f"sekd_questions_total {after['questions']}\n" in server.get("/metrics").text
    assert server.get("/health").json()["status"] == "ok"


def test_a_full_queue_is_429_with_the_pause_and_a_failed_pass_is_500_and_counted(monkeypatch):
    monkeypatch.setattr(service, "WAITING", 1)
    computes, may_go_on = threading.Event(), threading.Event()

    class Failing:
        def hidden_states(self, inputs, rows):
            computes.set()
            assert may_go_on.wait(60)
            raise RuntimeError("out of memory,\nsays the device")

    info = ServerInfo("tiny", rows=384, width=2, dtype="float32", hidden=True, max_length=99, max_k=64)
    worker = service.Worker(Failing(), torch.device("cpu"), 1024)
    client = TestClient(make_app(worker, info, head=None, tokenizer={}, token=None, max_bytes=2**20))
    asked = {"teacher": info.fingerprint, "format": "hidden", "dtype": "float32", "together": False}
    asked["sequences"] = [{"ids": IDS, "runs": [[3, 7]]}]
    with ThreadPoolExecutor(2) as pool:
        computed = pool.submit(client.post, "/v1/answers", json=asked)
        assert computes.wait(60)
        waiting = pool.submit(client.post, "/v1/answers", json=asked)
        while not worker.waiting:
            time.sleep(0.01)
        busy = client.post("/v1/answers", json=asked)
        may_go_on.set()
        failed = [answer.result() for answer in (computed, waiting)]
    assert (busy.status_code, busy.headers["Retry-After"]) == (429, "2")
    lines = [answer.json()["error"] for answer in failed]
    assert lines == ["the forward pass failed: out of memory, says the device"] * 2
    assert [answer.status_code for answer in failed] == [500, 500]
    assert "sekd_failures_total 2\n" in client.get("/metrics").text


def test_a_server_for_other_machines_needs_a_token_and_asks_for_it(tiny_root, monkeypatch):
    refused = command([SEKD, "serve", "--model", str(tiny_root / "teacher"), "--host", "0.0.0.0", "--port", "0"])
    assert refused.returncode == 2
    assert "SEKD_SERVER_TOKEN" in refused.stderr.strip().splitlines()[-1]

    with serving(tiny_root / "teacher", "--host", "0.0.0.0", env={"SEKD_SERVER_TOKEN": "secret"}) as guarded:
        assert guarded.get("/health").status_code == 200
        assert guarded.get("/v1/info").status_code == 401
        assert guarded.get("/v1/info", headers={"Authorization": "Bearer other"}).status_code == 401
        assert guarded.get("/v1/info", headers={"Authorization": "Bearer secret"}).status_code == 200
        with pytest.raises(
            TeacherError, match=r"refuses this run's token .* set the environment variable SEKD_SERVER"
        ):
            Connection(guarded.url, 1200)
        monkeypatch.setenv("SEKD_SERVER_TOKEN", "secret")
        assert Connection(guarded.url, 1200).info.rows == 384
        assert not any("secret" in line for line in guarded.lines)


def test_what_cannot_be_served_is_one_line(tiny_root, server):
    for arguments in (
        ["--model", str(tiny_root / "nothing")],
        ["--model", str(tiny_root / "teacher"), "--port", str(server.port)],
        ["--model", str(tiny_root / "teacher"), "--port", "0", "--dtype", "int8"],
        ["--model", str(tiny_root / "teacher"), "--port", "0", "no_such_argument=1"],
        *([] if find_spec("bitsandbytes") else [["--model", str(tiny_root / "teacher"), "--quantization-bit", "4"]]),
    ):
        result = forked([SEKD, "serve", *arguments])
        assert result.returncode == 2, result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("sekd serve: error: ")
        assert "Traceback" not in result.stderr
