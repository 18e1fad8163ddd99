"""`sekd cache --server`: equal to the local build to the bit, continued after either side was killed."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.cached_runs import build, content, from_cache, losses
from helpers.forks import Fork, forked
from helpers.runs import base_config, write_yaml
from helpers.servers import SEKD, serving

from llamafactory_sekd.teacher.cache.cache_manifest import Manifest


SLOW_BUILD = """
import json, sys
from pathlib import Path
from llamafactory_sekd.cli import apply_plugin
apply_plugin()
from llamafactory_sekd.host.served_teacher import build_from_server
from llamafactory_sekd.teacher.cache.cache_manifest import Settings
from llamafactory_sekd.teacher.cache.filling import Session
from llamafactory_sekd.teacher.served.connection import Connection
import time

write = Session.writer
Session.writer = lambda self: write(self, shard_bytes=1)  # a shard per example
ask = Connection.ask

def slowly(self, *args, **kwargs):
    time.sleep(0.5)
    return ask(self, *args, **kwargs)

Connection.ask = slowly
build_from_server(
    json.load(open(sys.argv[1])), Path(sys.argv[2]), Settings(), sys.argv[3], batch_size=2, in_flight=2
)
"""


@pytest.fixture(scope="module")
def server(tiny_root):
    with serving(tiny_root / "teacher") as running:
        yield running


def assert_same_bits(ours: Path, theirs: Path) -> None:
    first, second = content(ours), content(theirs)
    assert first
    assert first.keys() == second.keys()
    for key, record in first.items():
        for name, values in record.items():
            assert torch.equal(values, second[key][name]), (key, name)


@pytest.mark.parametrize("settings", [{}, {"format": "topk", "k": 16}], ids=["hidden", "topk"])
def test_a_cache_through_the_server_is_the_local_one_to_the_bit(tiny_root, tmp_path, server, settings):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    local = build(config, tmp_path / "local", **settings)
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    yaml = str(write_yaml(tmp_path / "x.yaml", config))
    served = tmp_path / "served"
    result = forked([SEKD, "cache", yaml, "--out", str(served), "--server", server.url, *options], cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_bits(served, local)
    assert Manifest.load(served) == Manifest.load(local)
    assert losses(from_cache(config, served)) == losses(from_cache(config, local))


def slow_build(tmp_path: Path, config: dict, url: str) -> Fork:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(config))
    arguments = [sys.executable, "-c", SLOW_BUILD, str(path), str(tmp_path / "cache"), url]
    return Fork(arguments, merged=True)


def wait_for_shards(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 1200
    while len(list(folder.glob("shard-*"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_client_is_continued_and_computes_only_what_is_missing(tiny_root, tmp_path, server):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    local = build(config, tmp_path / "local", batch_size=2)
    client = slow_build(tmp_path, config, server.url)
    wait_for_shards(tmp_path / "cache", 5)  # the last may not be in the index yet
    client.send_signal(signal.SIGKILL)
    client.wait()
    there = len(content(tmp_path / "cache"))
    assert 4 <= there < len(content(local))

    yaml = str(write_yaml(tmp_path / "x.yaml", config))
    arguments = [SEKD, "cache", yaml, "--out", str(tmp_path / "cache"), "--server", server.url, "--batch-size", "2"]
    result = forked(arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"({there} are there already)" in result.stdout
    assert_same_bits(tmp_path / "cache", local)


def test_a_killed_server_that_comes_back_costs_no_example(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    local = build(config, tmp_path / "local", batch_size=2)
    with serving(tiny_root / "teacher") as first:
        client = slow_build(tmp_path, config, first.url)
        wait_for_shards(tmp_path / "cache", 4)
        first.kill()
        time.sleep(1)
        with serving(tiny_root / "teacher", port=first.port):
            output = client.completed().stdout

    assert client.returncode == 0, output[-3000:]
    assert "cannot be reached" in output
    assert "the next try is in 1 s" in output
    assert_same_bits(tmp_path / "cache", local)


def test_another_model_in_the_servers_place_is_one_clear_error_and_what_is_there_stays(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    with serving(tiny_root / "teacher") as first:
        client = slow_build(tmp_path, config, first.url)
        wait_for_shards(tmp_path / "cache", 4)
        first.kill()
        with serving(tiny_root / "student", port=first.port):
            output = client.completed().stdout
            assert client.returncode != 0
            assert "this server has the teacher" in output.strip().splitlines()[-1]
            before = content(tmp_path / "cache")
            assert before
            yaml = str(write_yaml(tmp_path / "x.yaml", config))
            arguments = [SEKD, "cache", yaml, "--out", str(tmp_path / "cache"), "--server", first.url]
            result = forked(arguments, cwd=tmp_path)

    assert result.returncode == 2
    assert "teacher_weights" in result.stderr.strip().splitlines()[-1]
    assert content(tmp_path / "cache").keys() == before.keys()
