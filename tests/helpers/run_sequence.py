"""Runs several trainings from one import of the host, under torchrun or alone: `sequence.py runs.json`.

Each run is a dict with `config` and, optionally, `kill`: the point at which this process is killed (see `KILLS`).
Alone, each run is a fork of its own, and the exit status of each is printed as one JSON list; runs under a launcher
share their process group, and none of them may be killed but the last.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from llamafactory.train.tuner import run_exp
from transformers import trainer_callback, trainer_utils

from llamafactory_sekd.checkpoints import DistillationState
from llamafactory_sekd.trainer import DistillationTrainer


STEP = 4  # of the checkpoint whose writing is interrupted


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half(path: str | Path) -> None:
    """Cut a file to its first half."""
    os.truncate(path, Path(path).stat().st_size // 2)


def interrupt(owner: object, name: str, before: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def interrupted(*args, **kwargs):
        before(original, *args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, interrupted)


def in_a_step() -> None:
    def before(original, self, *args, **kwargs):
        if self.state.global_step == STEP + 1:
            die()

    interrupt(DistillationTrainer, "compute_loss", before)


def in_a_step_of_rank_1() -> None:
    if os.environ["RANK"] == "1":
        in_a_step()


def in_the_weights() -> None:
    def before(original, self, output_dir=None, **kwargs):
        if output_dir and output_dir.endswith(f"-{STEP}"):
            original(self, output_dir, **kwargs)
            (written,) = Path(output_dir).glob("*model.safetensors")
            half(written)
            die()

    interrupt(DistillationTrainer, "save_model", before)


def in_the_optimizer() -> None:
    def before(original, content, path, **kwargs):
        if str(path).endswith(f"-{STEP}/optimizer.pt"):
            original(content, path, **kwargs)
            half(path)
            die()

    interrupt(torch, "save", before)


def in_our_state() -> None:
    def before(original, self, checkpoint):
        if str(checkpoint).endswith(f"-{STEP}"):
            (Path(checkpoint) / "kd_state.tmp").write_text("{")
            die()

    interrupt(DistillationState, "save", before)


def in_the_trainer_state() -> None:
    def before(original, self, path):
        if path.endswith(f"-{STEP}/trainer_state.json"):
            original(self, path)
            half(path)
            die()

    interrupt(trainer_callback.TrainerState, "save_to_json", before)


def after_the_checkpoint() -> None:
    def before(original, self, *args, **kwargs):
        if self.state.global_step == STEP:
            original(self, *args, **kwargs)
            die()

    interrupt(DistillationTrainer, "_save_checkpoint", before)


def disk_full() -> None:
    """Every write beyond 20 KB of a file fails from the checkpoint on, as on a full disk."""

    def before(original, self, *args, **kwargs):
        if self.state.global_step == STEP:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    interrupt(DistillationTrainer, "_save_checkpoint", before)


KILLS = {
    function.__name__: function
    for function in (
        in_a_step,
        in_a_step_of_rank_1,
        in_the_weights,
        in_the_optimizer,
        in_our_state,
        in_the_trainer_state,
        after_the_checkpoint,
        disk_full,
    )
}


def run(job: dict) -> None:
    if job.get("kill"):
        KILLS[job["kill"]]()
    run_exp(job["config"])


def run_forked(job: dict) -> int:
    """Run a job in a fork and return its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            log = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            run(job)
            status = 0
        except BaseException as error:
            Path(job["log"]).with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
        finally:
            sys.stdout.flush()
            os._exit(status)

    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_on_ranks(jobs: list[dict]) -> None:
    from accelerate.state import AcceleratorState

    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *_: None  # the host does so after each run
    environment = dict(os.environ)
    for job in jobs:
        run(job)
        AcceleratorState._reset_state()
        os.environ.clear()
        os.environ.update(environment)
        trainer_utils.set_seed(0)
    destroy()


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv.pop(1)).read_text())
    if "RANK" in os.environ:
        run_on_ranks(jobs)
    else:
        statuses = [run_forked(job) for job in jobs]
        print("statuses", json.dumps(statuses))
