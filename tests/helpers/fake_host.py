"""A stand-in for `llamafactory-cli` that takes no time, for tests of what is run, when, and how often.

    python fake_host.py train train.yaml [resume_from_checkpoint=…] | eval eval.yaml

Every start is a line in `starts.txt` next to this file. A training with the key `fail` ends with status 3, one with
`slow` takes its steps in hundredths of a second and saves a checkpoint at each.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zipfile
from pathlib import Path

import yaml


def save_checkpoint(checkpoint: Path, step: int) -> None:
    """Save the files of a complete checkpoint, as small as they can be; `trainer_state.json` is the last."""
    checkpoint.mkdir(exist_ok=True)
    header = b"{}"
    (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with zipfile.ZipFile(checkpoint / name, "w") as archive:
            archive.writestr("data.pkl", b"")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def train(config: dict, overrides: list[str]) -> None:
    out = Path(config["output_dir"])
    out.mkdir(parents=True, exist_ok=True)
    if config.get("fail"):
        print("RuntimeError: no more\x1b[0m")
        sys.exit(3)
    steps = config.get("slow", 1)
    done = int(overrides[0].rpartition("-")[2]) if overrides else 0
    for step in range(done + 1, steps + 1):
        with open(out / "steps.txt", "a") as file:
            file.write(f"{step}\n")
        save_checkpoint(out / f"checkpoint-{step}", step)
        (out / "trainer_log.jsonl").write_text(json.dumps({"current_steps": step, "total_steps": steps}) + "\n")
        time.sleep(0.01 if config.get("slow") else 0)
    entry = {"eval_loss": 2.0, "eval_kd/ce": 1 + abs(config["learning_rate"] - 0.002) * 100 + config["seed"] / 1000}
    (out / "config.json").write_text("{}")
    (out / "train_results.json").write_text(json.dumps({"train_runtime": 1.5, "train_samples_per_second": 8.0}))
    state = {"global_step": steps, "log_history": [{"loss": 3.0}, {"eval_loss": 9.0}, entry, {"train_runtime": 1.5}]}
    (out / "trainer_state.json").write_text(json.dumps(state))


def evaluate(config: dict) -> None:
    from llamafactory_sekd.data.testsets import load_test_set
    from llamafactory_sekd.evaluation.evaluation_settings import parse_settings
    from llamafactory_sekd.evaluation.translation_store import open_workspace

    out = Path(config["save_dir"])
    test_set = load_test_set(config["task"], config["task_dir"], "en-de")
    with open_workspace(parse_settings(config, "eval.yaml"), {"en-de": test_set}):
        path = out / "hypotheses" / "model" / "en-de.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line.lower()}\n" for line in test_set.references))
        scores = {"bleu": 10.0, "chrf": 20.0}
        if out.name == "validation":  # the best learning rate is 0.002
            rate = yaml.safe_load((out.parent / "train.yaml").read_text())["learning_rate"]
            scores = {"bleu": 10 - abs(rate - 0.002) * 1000, "chrf": 20.0}
        system = {"scores": {"en-de": scores, "average": scores}, "guards": {"en-de": {"empty": 0.0}}}
        results = {"metrics": ["bleu", "chrf"], "skipped": {}, "systems": {"model": system}}
        (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    command, path, *rest = sys.argv[1:]
    with open(Path(__file__).with_name("starts.txt"), "a") as starts:
        starts.write(
            f"{command} {Path(path).parent.name} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')} {os.getpid()}\n"
        )
    content = yaml.safe_load(Path(path).read_text())
    if command == "train":
        train(content, rest)
    else:
        evaluate(content)
