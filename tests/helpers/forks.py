"""Commands in forks of one process that has imported the host, where a test is about what a command does.

A launch of `llamafactory-cli` costs several seconds of imports, on each rank. Here they are paid once per worker of
the suite: a fork runs the same entry point with its own arguments, environment, folder and standard streams, and ends
like any other process. Tests of what happens at a process's start (imports, patches, launchers) use `runs.command`.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TextIO


# Before any test changes it; where there is CUDA, a look for devices must not start it before the forks.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
_TURN = threading.Lock()  # of threads of a test


class Fork:
    """A command that runs, with the part of `subprocess.Popen` that tests use; its streams are files."""

    def __init__(
        self,
        arguments: list[str],
        *,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        stdin: bytes = b"",
        merged: bool = False,
    ) -> None:
        self.arguments = arguments
        self._folder = tempfile.TemporaryDirectory(prefix="fork-")
        folder = Path(self._folder.name)
        self.out, self.err = folder / "out", folder / ("out" if merged else "err")
        (folder / "in").write_bytes(stdin)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.returncode: int | None = None
        self.pid = _ask(
            "start",
            arguments=arguments,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **(env or {})},
            cwd=str(cwd or Path.cwd()),
            streams=[str(folder / "in"), str(self.out), str(self.err)],
        )

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask("poll", pid=self.pid)
        return self.returncode

    def wait(self, timeout: float = 1800) -> int:
        end = time.monotonic() + timeout  # only detects a hang
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"{self.arguments} did not end in {timeout} s:\n{text(self.err)[-3000:]}")
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def completed(self, timeout: float = 1800) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(self.arguments, self.wait(timeout), text(self.out), text(self.err))


def text(stream: Path) -> str:
    return stream.read_bytes().decode() if stream.exists() else ""


def forked(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Like `runs.command`, for `llamafactory-cli …`, `sekd …`, `python -c …` and `python FILE …`."""
    return Fork(arguments, **options).completed()


def forked_ranks(
    arguments: list[str], *, env: dict[str, str] | None = None, cwd: Path | None = None, ranks: int = 2
) -> subprocess.CompletedProcess[str]:
    """Like `torchrun --nproc_per_node RANKS …`: when a rank fails the others are ended, and its status is it."""
    from helpers.engines import free_port  # which imports torch

    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "GROUP_RANK": "0"}
    each = [{**(env or {}), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    forks = [Fork(arguments, env=variables, cwd=cwd) for variables in each]
    while None in (statuses := [fork.poll() for fork in forks]) and not any(statuses):
        time.sleep(0.01)
    failed = [fork.returncode for fork in forks if fork.returncode]
    for fork in forks:
        fork.kill()
    ended = [fork.completed() for fork in forks]
    streams = ["".join(getattr(rank, name) for rank in ended) for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(arguments, failed[0] if failed else 0, *streams)


def wait_for(condition: Callable[[], Any], process: Fork, timeout: float = 1200) -> None:
    """Return when a condition holds; a process that ends before is an error, which shows what it said."""
    end = time.monotonic() + timeout  # only detects a hang
    while not condition():
        assert process.poll() is None, text(process.err)[-3000:]
        assert time.monotonic() < end
        time.sleep(0.002)


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    atexit.register(server.stdin.close)
    return server


def _ask(what: str, **details: Any) -> Any:
    with _TURN:
        server = _server()
        server.stdin.write(json.dumps({"what": what, **details}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())


def _serve() -> dict[str, Any] | None:
    """Answer until the questions end; return what to run in a fork."""
    with os.fdopen(os.dup(0)) as questions, os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        _import_what_commands_import()
        gc.collect()
        gc.freeze()  # a collection in a fork would touch, and so copy, all that is imported
        for line in questions:
            question = json.loads(line)
            if question["what"] == "start":
                pid = os.fork()
                if pid == 0:
                    return question
                _answer(answers, pid)
            else:
                pid, status = os.waitpid(question["pid"], os.WNOHANG)
                _answer(answers, os.waitstatus_to_exitcode(status) if pid else None)
    return None


def _answer(answers: TextIO, what: int | None) -> None:
    answers.write(f"{json.dumps(what)}\n")
    answers.flush()


def _import_what_commands_import() -> None:
    import llamafactory.train.tuner  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import llamafactory_sekd.cli
    import llamafactory_sekd.host.evaluate
    import llamafactory_sekd.trainer  # noqa: F401


def _become(what: dict[str, Any]) -> None:
    """Run a command as if this process had been started for it."""
    from llamafactory_sekd.children import end_with_parent

    end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a suite in the background ignores
    os.environ.clear()
    os.environ.update(what["env"])
    os.chdir(what["cwd"])
    for number, path in enumerate(what["streams"]):
        stream = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, number)
        os.close(stream)

    program, *arguments = what["arguments"]
    name = Path(program).name
    if name == "llamafactory-cli":
        from llamafactory.cli import main
    elif name == "sekd":
        from llamafactory_sekd.cli import main
    elif arguments[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        return
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")
        return

    sys.argv, sys.path[0] = [program, *arguments], str(Path(sys.executable).parent)
    sys.exit(main())


def _run(what: dict[str, Any]) -> int:
    """Run a command and return its exit status, as Python's own start does."""
    try:
        _become(what)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # which may be ours
        return 1
    return 0


if __name__ == "__main__":
    if command := _serve():
        status = _run(command)
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # at once: to take all that was imported apart costs as much as a training
