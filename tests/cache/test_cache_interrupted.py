"""A build or a filling run that is killed is continued, by one rank or two, to what an uninterrupted one makes."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
from helpers import engines
from helpers.cached_runs import assert_same_content, build, content, from_cache, losses
from helpers.forks import forked, forked_ranks
from helpers.runs import CLI, base_config, command, logged, train, write_yaml

from llamafactory_sekd.teacher.cache.record_store import damaged_shards


SEKD = str(Path(CLI).with_name("sekd"))

KILLED_BUILD = """
import json, os, signal, sys
from pathlib import Path
from llamafactory_sekd.host import cache
from llamafactory_sekd.teacher.cache.cache_manifest import Settings
from llamafactory_sekd.teacher.cache.filling import Session

write = Session.writer
Session.writer = lambda self: write(self, shard_bytes=1)  # a shard per example
fill = cache.fill

def killed_fill(*args, progress, **kwargs):
    rounds = []
    def count(tokens):
        rounds.append(tokens)
        progress(tokens)
        if len(rounds) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    fill(*args, progress=count, **kwargs)

cache.fill = killed_fill
cache.build_cache(json.load(open(sys.argv[1])), Path(sys.argv[2]), Settings())
"""

KILLED_FILL = """
import json, os, signal, sys
from transformers import TrainerCallback
from llamafactory.train.tuner import run_exp

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

run_exp(json.load(open(sys.argv.pop(1))), callbacks=[Kill()])
"""


@pytest.fixture(scope="module")
def complete(tiny_root, tmp_path_factory):
    config = base_config(tiny_root, output_dir="unused")
    return build(config, tmp_path_factory.mktemp("complete") / "cache")


def as_json(path: Path, config: dict) -> str:
    path.write_text(json.dumps(config))
    return str(path)


def test_a_killed_build_is_continued_by_the_real_command(tiny_root, tmp_path, complete):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"))
    arguments = [as_json(tmp_path / "x.json", config), str(tmp_path / "cache")]
    assert forked([sys.executable, "-c", KILLED_BUILD, *arguments]).returncode == -signal.SIGKILL
    before = content(tmp_path / "cache")
    assert len(before) == 12  # three rounds of four

    yaml = str(write_yaml(tmp_path / "x.yaml", config))
    result = command([SEKD, "cache", yaml, "--out", str(tmp_path / "cache")])
    assert result.returncode == 0, result.stderr[-2000:]
    assert "20 examples (12 are there already)" in result.stdout
    assert "tok/s" in result.stderr
    assert_same_content(tmp_path / "cache", complete)
    assert damaged_shards(tmp_path / "cache") == {}

    refused = forked([SEKD, "cache", yaml, "--out", str(tmp_path / "cache"), "--format", "topk"])
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith("sekd cache: error: `--out ")
    assert "Traceback" not in refused.stderr


def test_a_run_killed_in_its_filling_epoch_is_continued(tiny_root, tmp_path, complete):
    config = base_config(
        tiny_root,
        output_dir=str(tmp_path / "out"),
        teacher_cache=str(tmp_path / "cache"),
        save_strategy="steps",
        save_steps=2,
        max_steps=16,
    )
    killed = forked([sys.executable, "-c", KILLED_FILL, as_json(tmp_path / "x.json", config)])
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert len(content(tmp_path / "cache")) == 16  # what was there at the checkpoint of step 4

    resumed = train({**config, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-4")})
    assert_same_content(tmp_path / "cache", complete)
    online = train({**config, "teacher_cache": str(complete), "output_dir": str(tmp_path / "online")})
    assert logged(resumed, "kd/difficulty") == pytest.approx(logged(online, "kd/difficulty"), abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "zero3"])
def test_two_ranks_build_fill_and_read_what_one_rank_does(tiny_root, tmp_path, complete, sharded):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), ddp_backend="gloo")
    if sharded:
        config["deepspeed"] = engines.zero_config(tmp_path, 3)

    yaml = str(write_yaml(tmp_path / "x.yaml", config))
    built = tmp_path / "built"
    result = forked_ranks([SEKD, "cache", yaml, "--out", str(built)], cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-6000:]
    assert len(list(built.glob("index-*.json"))) == 2
    assert_same_content(built, complete)

    reference = train(base_config(tiny_root, output_dir=str(tmp_path / "one"), per_device_train_batch_size=8))
    runs = {
        "read": from_cache(config, built),
        "fill": {**config, "teacher_cache": str(tmp_path / "filled"), "output_dir": str(tmp_path / "fill")},
    }
    engines.launch(list(runs.values()), tmp_path)
    for name, run in runs.items():
        for key in ("loss", "kd/difficulty", "kd/hard_ratio"):
            assert logged(Path(run["output_dir"]), key) == pytest.approx(logged(reference, key), abs=2e-4), (name, key)

    assert_same_content(tmp_path / "filled", complete)
    single = base_config(tiny_root, output_dir=str(tmp_path / "single"))
    assert losses(from_cache(single, tmp_path / "filled")) == pytest.approx(losses(single), rel=1e-6)


def test_a_disk_that_a_librarys_own_files_fill_is_one_line_and_the_same_command_works_afterwards(tiny_root, tmp_path):
    config = write_yaml(tmp_path / "x.yaml", base_config(tiny_root, output_dir=str(tmp_path / "out")))
    build_it = [SEKD, "cache", str(config), "--out", str(tmp_path / "cache")]
    env = {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    full = command(["bash", "-c", 'ulimit -f 16; exec "$@"', "bash", *build_it], env=env, cwd=tmp_path)
    assert full.returncode == 2, full.stderr[-500:]
    assert "sekd cache: error: no room to write (" in full.stderr
    assert "Traceback" not in full.stderr
    again = command(build_it, env=env, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-500:]
