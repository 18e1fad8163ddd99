"""The host's progress log with the distillation metrics in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
