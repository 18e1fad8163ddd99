"""One contender: a training run of the host in a process of its own, which takes its steps when it is told to.

So the steps of several contenders interleave, each on the same batch as the others', and a busy moment of the machine
meets all of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from llamafactory_sekd.cli import apply_plugin
from llamafactory_sekd.errors import SekdError


class Contender:
    """A run that waits before each of its steps.

    Args:
        name: for the log and for messages.
        config: the YAML's keys; `max_steps` bounds the number of turns.
        log: where its output goes.
        forward_only: instead of training steps, two forward passes without gradients, and their times.
    """

    def __init__(self, name: str, config: dict[str, Any], log: Path, *, forward_only: bool = False) -> None:
        self.name = name
        self.log = log
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs, config, str(log), forward_only), daemon=True)
        self.process.start()
        theirs.close()
        self._receive()  # ready for its first step

    def step(self) -> Any:
        """Let it take one step; returns its seconds (or the seconds of the two forward passes)."""
        self.connection.send("go")
        return self._receive()

    def finish(self) -> dict[str, int]:
        """Wait for its end; returns resident bytes: once the libraries were ``imported``, and at the ``peak``."""
        memory = self._receive()
        self.process.join()
        return memory

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            raise SekdError(f"The run {self.name!r} ended early:\n{self.log.read_text()[-3000:]}") from None


def _run(connection: Connection, config: dict[str, Any], log: str, forward_only: bool) -> None:
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)

    apply_plugin()
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    imported = _memory()["now"]

    class TakesTurns(TrainerCallback):
        """Waits at the start of each step. A step lasts until the next one: logging and the next batch included."""

        started: float | None = None

        def on_train_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            _forget_peak()  # of loading
            connection.send("ready")

        def on_step_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            self._report()
            connection.recv()
            self.started = time.perf_counter()

        def on_train_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            self._report()
            connection.send({"imported": imported, "peak": _memory()["peak"]})

        def _report(self) -> None:
            if self.started is not None:
                connection.send(forward_seconds or time.perf_counter() - self.started)

    forward_seconds: list[float] = []
    if forward_only:
        _replace_steps(lambda seconds: forward_seconds.__setitem__(slice(None), seconds))

    run_exp(config, callbacks=[TakesTurns()])


def _replace_steps(report: Callable[[list[float]], None]) -> None:
    """Replace the trainer's steps by forward passes: logits of every token, then of the response's alone."""
    import torch
    from transformers import Trainer

    from llamafactory_sekd.lm_head import rows_of, selected_rows
    from llamafactory_sekd.objectives import response_positions

    def forward(self: Trainer, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        inputs = self._prepare_inputs(inputs)
        rows, _ = response_positions(inputs.pop("labels"))
        model.eval()
        times = [time.perf_counter()]
        with torch.no_grad():
            model(**inputs, use_cache=False)
            times.append(time.perf_counter())
            with selected_rows(model.get_output_embeddings(), rows_of(rows)):
                model(**inputs, use_cache=False)
            times.append(time.perf_counter())
        report([times[1] - times[0], times[2] - times[1]])
        return torch.zeros(())

    Trainer.training_step = forward


def _memory() -> dict[str, int]:
    """Resident bytes of this process, ``now`` and at their ``peak`` (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"now": "VmRSS", "peak": "VmHWM"}
    return {key: int(lines[name].split()[0]) * 1024 for key, name in names.items()}


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
