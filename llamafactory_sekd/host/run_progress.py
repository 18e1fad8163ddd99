"""How far a run is: our metrics in the host's log, and the phase of a run that the web UI has started."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llamafactory_sekd.files import read_json, write_json
from llamafactory_sekd.host.run_arguments import HostArguments


# In the folder of the run, while it lasts.
PHASE_FILE = "phase.json"
LOADING, FIRST_PASS, TRAINING, VALIDATION = "loading", "first_pass", "training", "validation"
# Loading: data and student, then the teacher.
LOADING_STEPS = 2
# Seconds between two notes of one phase; the page looks every two seconds.
_EVERY = 1.0


class _MergingPool:
    """Replaces the log callback's thread pool during one call and adds metrics to the record that it writes."""

    def __init__(self, pool: Any, metrics: dict[str, float]) -> None:
        self.pool = pool
        self.metrics = metrics

    def submit(self, write: Callable[..., None], output_dir: str, logs: dict[str, Any]) -> None:
        self.pool.submit(write, output_dir, {**logs, **self.metrics})


def extend_log_callback(host_class: type) -> type:
    """Return a subclass of the host's LogCallback that also writes metrics whose name holds ``kd/``.

    They go to ``trainer_log.jsonl`` and, in a run that the web UI started, to the log that the page shows.
    """

    class LogCallback(host_class):
        thread_pool: Any
        webui_mode: bool

        __doc__ = host_class.__doc__

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            metrics = {name: value for name, value in state.log_history[-1].items() if "kd/" in name}
            pool: Any = self.thread_pool
            if pool is None or not metrics:
                super().on_log(args, state, control, **kwargs)
                return
            self.thread_pool = _MergingPool(pool, metrics)
            try:
                super().on_log(args, state, control, **kwargs)
            finally:
                self.thread_pool = pool

            if self.webui_mode and args.should_save:
                from llamafactory.extras import logging

                shown = ", ".join(f"'{name}': {value:.4g}" for name, value in metrics.items())
                logging.get_logger(host_class.__module__).info_rank0("{" + shown + "}")

    LogCallback.__module__ = host_class.__module__
    LogCallback.__qualname__ = host_class.__qualname__
    return LogCallback


class Phases(TrainerCallback):
    """Notes the phase of a run: which one, how much of it is done, and how long that took.

    Args:
        folder: where to; None notes nothing.

    Attributes:
        fills_cache: whether the teacher still answers in the first epoch, which is then a phase of its own.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.fills_cache = False
        self._name = ""
        self._since = self._noted = 0.0
        self._began: dict[str, int] = {}
        self._spent: dict[str, float] = {}
        self._batches = 0

    def note(self, name: str, done: int, total: int) -> None:
        """Note that ``done`` of ``total`` steps of a phase are done, unless that was noted a moment ago."""
        if self.folder is None:
            return
        now = time.monotonic()
        if name != self._name:
            if self._name:
                self._spent[self._name] = self._spent.get(self._name, 0.0) + now - self._since
            self._name, self._since = name, now
            self._began.setdefault(name, done)
        elif done < total and now - self._noted < _EVERY:
            return
        self._noted = now
        seconds = self._spent.get(name, 0.0) + now - self._since
        here = done - self._began[name]  # a resumed run has begun later
        left = seconds / here * (total - done) if here else None
        found = {"phase": name, "done": done, "total": total, "seconds": seconds, "seconds_left": left}
        write_json(self.folder / PHASE_FILE, found)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a step of the training, or of the epoch in which the teacher answers."""
        epoch = -(-state.max_steps // max(1, state.num_train_epochs))
        if self.fills_cache and state.global_step <= epoch:
            self.note(FIRST_PASS, state.global_step, epoch)
        else:
            self.note(TRAINING, state.global_step, state.max_steps)

    on_train_begin = on_step_end

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a batch of the validation."""
        batches: Any = kwargs.get("eval_dataloader")
        if hasattr(batches, "__len__"):
            self._batches += 1
            self.note(VALIDATION, self._batches, len(batches))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the next validation begin at its start, and show the training again."""
        self._batches = 0
        self.on_step_end(args, state, control)
        self._began.pop(VALIDATION, None)
        self._spent.pop(VALIDATION, None)


@contextmanager
def phases_of(run: HostArguments) -> Iterator[Phases]:
    """Give what notes the phases of a run that the web UI has started; of another run it notes nothing."""
    from llamafactory.extras.misc import is_env_enabled

    watched = is_env_enabled("LLAMABOARD_ENABLED") and run.is_first_rank
    phases = Phases(Path(run.training.output_dir) if watched else None)
    try:
        phases.note(LOADING, 0, LOADING_STEPS)
        yield phases
    finally:
        forget_phase(phases.folder)


def forget_phase(folder: Path | None) -> None:
    """Take away what a run in this folder has noted."""
    if folder is not None:
        (folder / PHASE_FILE).unlink(missing_ok=True)


def first_bar(words: dict[str, str]) -> dict[str, Any]:
    """Return label and percentage of the bar of a run that has noted nothing yet; ``words`` are the page's."""
    return {"label": f"{words['phase_' + LOADING]} 0/{LOADING_STEPS}", "value": 0.0}


def bar_of(folder: Path | None, words: dict[str, str]) -> dict[str, Any] | None:
    """Return label and percentage of the bar of the phase that a run is in; None without one, as after its end.

    Args:
        folder: the run's.
        words: of the page's language.
    """
    found = read_json(folder / PHASE_FILE) if folder is not None else None
    if not found:
        return None
    done, total, left = found["done"], found["total"], found["seconds_left"]
    label = f"{words['phase_' + found['phase']]} {done}/{total}: {_clock(found['seconds'])}"
    label += f" < {_clock(left)}" if left is not None else ""
    return {"label": label, "value": round(100 * done / max(1, total), 2)}


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
