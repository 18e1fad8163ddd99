"""`teacher_server`: the training is that of a local teacher, its answers fetched ahead, and no fault loses a step."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers import engines
from helpers.cached_runs import losses
from helpers.forks import Fork, forked
from helpers.runs import CLI, base_config, logged, train, write_yaml
from helpers.servers import serving

from llamafactory_sekd.errors import SekdError


@pytest.fixture(scope="module")
def server(tiny_root):
    with serving(tiny_root / "teacher") as running:
        yield running


def served(config: dict, url: str, **changes) -> dict:
    config = {key: value for key, value in config.items() if key != "teacher_model"}
    return {**config, "teacher_server": url, "output_dir": config["output_dir"] + "_served", **changes}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"neat_packing": True, "packing": True, "flash_attn": "sdpa"},
        {"kd_on_policy": 0.5, "max_new_tokens": 12, "gradient_accumulation_steps": 2},
        {"kd_on_policy": 1.0, "max_new_tokens": 12},
        {"eval_dataset": "tiny_valid", "eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=["plain", "accumulation", "packed", "on policy in part", "on policy", "evaluation"],
)
def test_a_run_with_a_server_is_the_run_with_its_model(tiny_root, tmp_path, server, keys):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), **keys)
    assert losses(served(config, server.url)) == pytest.approx(losses(config), rel=1e-5)


def test_a_teacher_whose_logits_are_capped_is_served_as_it_is(tiny_root, tmp_path):
    from helpers.cached_runs import from_cache
    from helpers.tiny import save_scaled_or_capped

    from llamafactory_sekd.host.served_teacher import build_from_server
    from llamafactory_sekd.teacher.cache.cache_manifest import Settings

    teacher = save_scaled_or_capped(tmp_path / "gemma2", "gemma2")
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), teacher_model=str(teacher))
    expected = pytest.approx(losses(config), rel=1e-5)
    with serving(teacher) as running:
        assert losses(served(config, running.url)) == expected
        build_from_server(config, tmp_path / "cache", Settings(), running.url, say=lambda _: None)
    assert losses(from_cache(config, tmp_path / "cache")) == expected


def test_topk_answers_train_as_a_topk_cache_does(tiny_root, tmp_path, server):
    from helpers.cached_runs import build, from_cache

    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    cache = build(config, tmp_path / "cache", format="topk", k=16, dtype="float32")
    found = losses(served(config, server.url, teacher_server_topk=16))
    assert found == pytest.approx(losses(from_cache(config, cache)), rel=1e-5)


def test_the_next_batch_is_asked_for_before_the_student_has_computed_this_one(tiny_root, tmp_path, server):
    from unittest.mock import patch

    from llamafactory_sekd.teacher.served.connection import Connection
    from llamafactory_sekd.trainer import DistillationTrainer

    events: list[str] = []
    ask, loss = Connection.ask, DistillationTrainer.compute_loss

    def asked(*args, **kwargs):
        events.append("asked")
        return ask(*args, **kwargs)

    def computed(*args, **kwargs):
        events.append("student")
        return loss(*args, **kwargs)

    config = served(base_config(tiny_root, output_dir=str(tmp_path / "out")), server.url)
    with patch.object(Connection, "ask", asked), patch.object(DistillationTrainer, "compute_loss", computed):
        train(config)
    assert events[:3] == ["asked", "asked", "student"]


def test_what_does_not_fit_is_refused_before_training(tiny_root, tmp_path, server):
    config = served(base_config(tiny_root, output_dir=str(tmp_path / "out")), server.url)
    for changes, words in (
        ({"teacher_model": str(tiny_root / "teacher")}, "`teacher_server` is the teacher; remove one"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers: 2"),
        ({"teacher_server": "host:8001"}, "is no address"),
        ({"teacher_server": "http://127.0.0.1:9", "teacher_server_patience": 3}, "cannot be reached"),
        ({"teacher_server_topk": 4}, "from 8 to 512"),
    ):
        with pytest.raises(SekdError, match=words):
            train({**config, **changes})


def test_a_server_with_another_tokenizer_is_refused_in_one_line(tiny_root, tmp_path):
    from helpers.cached_runs import from_cache

    from llamafactory_sekd.host.served_teacher import build_from_server
    from llamafactory_sekd.teacher.cache.cache_manifest import Settings

    strange = shutil.copytree(tiny_root / "teacher", tmp_path / "strange")
    tokens = json.loads((strange / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (strange / "tokenizer.json").write_text(json.dumps(tokens))
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    with serving(strange) as running:
        with pytest.raises(SekdError, match="tokenizer") as training:
            train(served(config, running.url))
        with pytest.raises(SekdError, match="tokenizer") as filling:
            build_from_server(from_cache(config, tmp_path / "c"), tmp_path / "c", Settings(), running.url)
    for error in (training, filling):
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out_served" / "trainer_log.jsonl").exists()
    assert not list((tmp_path / "c").glob("*.safetensors"))


@pytest.mark.slow
def test_two_ranks_with_a_server_are_one_rank_with_its_model(tiny_root, tmp_path, server):
    keys = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3, "per_device_train_batch_size": 4}
    two = {**keys, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    own = {"kd_on_policy": 0.5, "max_new_tokens": 8}
    jobs = []
    for name, more in (("plain", {}), ("own", own)):
        train(base_config(tiny_root, output_dir=str(tmp_path / name), **keys, **more))
        config = base_config(tiny_root, output_dir=str(tmp_path / name), **two, **more)
        jobs.append(served(config, server.url))
    engines.launch(jobs, tmp_path)
    for name in ("plain", "own"):
        for key in ("loss", "kd/teacher_kl", "kd/teacher_ce"):
            ours, expected = (logged(tmp_path / folder, key) for folder in (f"{name}_served", name))
            assert ours == pytest.approx(expected, abs=2e-4), (name, key)


def started(tmp_path: Path, config: dict) -> Fork:
    yaml = str(write_yaml(tmp_path / "x.yaml", config))
    return Fork([CLI, "train", yaml], merged=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 1200
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_server_killed_while_training_and_started_again_loses_no_step(tiny_root, tmp_path, server):
    config = base_config(
        tiny_root, output_dir=str(tmp_path / "out"), max_steps=60, save_strategy="steps", save_steps=5
    )
    reference = train(served(config, server.url, output_dir=str(tmp_path / "reference"), save_strategy="no"))
    with serving(tiny_root / "teacher") as first:
        run = started(tmp_path, served(config, first.url))
        wait_for(tmp_path / "out_served" / "checkpoint-5")
        first.kill()
        time.sleep(1)
        with serving(tiny_root / "teacher", port=first.port):
            assert run.wait() == 0, run.completed().stdout[-3000:]

    assert "cannot be reached" in run.completed().stdout
    assert logged(tmp_path / "out_served", "loss") == pytest.approx(logged(reference, "loss"), abs=1e-4)


@pytest.mark.slow
def test_a_killed_training_resumes_with_the_same_server_and_refuses_another(tiny_root, tmp_path, server):
    config = base_config(
        tiny_root, output_dir=str(tmp_path / "out"), max_steps=30, save_strategy="steps", save_steps=5
    )
    reference = train(served(config, server.url, output_dir=str(tmp_path / "reference"), save_strategy="no"))
    run = started(tmp_path, served(config, server.url))
    wait_for(tmp_path / "out_served" / "checkpoint-5" / "trainer_state.json")
    run.send_signal(signal.SIGKILL)
    run.wait()

    again = {**served(config, server.url), "resume_from_checkpoint": True, "overwrite_output_dir": False}
    yaml = str(write_yaml(tmp_path / "again.yaml", again))
    with serving(tiny_root / "student") as other:
        refused = forked([CLI, "train", yaml, f"teacher_server={other.url}"], cwd=tmp_path)
    assert refused.returncode != 0
    assert "is not the teacher that" in refused.stderr

    result = forked([CLI, "train", yaml], cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert logged(tmp_path / "out_served", "loss") == pytest.approx(logged(reference, "loss"), abs=1e-4)
    assert json.loads((tmp_path / "out_served" / "trainer_state.json").read_text())["global_step"] == 30
