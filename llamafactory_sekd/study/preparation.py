"""What comes once, before all cells: the study's own commands, and the teacher's one pass."""

from __future__ import annotations

import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llamafactory_sekd.children import run_child, tool
from llamafactory_sekd.config import write_yaml
from llamafactory_sekd.errors import StudyError, one_line
from llamafactory_sekd.files import read_json, write_json
from llamafactory_sekd.fingerprints import Digests
from llamafactory_sekd.study import ingredients
from llamafactory_sekd.study.device_shares import count
from llamafactory_sekd.study.matrix import Cell
from llamafactory_sekd.study.spec import Spec
from llamafactory_sekd.study.teacher_text import Announce


# Cells that agree in these have the same examples; the others add theirs to the same cache.
_EXAMPLES = ("dataset", "eval_dataset", "dataset_dir", "max_samples", "val_size")
_TEACHER = ("teacher_model", "teacher_model_adapters", "teacher_model_quantization_bit")
_RECORD = "preparation.json"


def prepare(spec: Spec, environment: Mapping[str, str], announce: Announce, stop: threading.Event) -> None:
    """Run the commands of ``prepare`` that were not run before; :class:`ChildError` when one fails.

    ``announce`` is called with what is being done, and shows it for the length of a block.
    """
    record = _read(spec)
    for number, (text, command) in enumerate(prepare_commands(spec), start=1):
        if text in record["prepare"]:
            continue
        log = spec.output_dir / "logs" / f"prepare-{number}.log"
        with announce(text) as report:
            run_child(command, log, lambda: 0.0, report, environment=environment, stop=stop)
        record["prepare"].append(text)
        write_json(spec.output_dir / _RECORD, record)


def remaining(spec: Spec) -> list[str]:
    """Return the commands of ``prepare`` that were not run yet."""
    return [text for text in spec.prepare if text not in _read(spec)["prepare"]]


def prepare_commands(spec: Spec) -> Iterator[tuple[str, list[str]]]:
    """Yield the text and the words of each command.

    ``sekd``, ``llamafactory-cli`` and ``python`` are those of this environment.
    """
    for text in spec.prepare:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise StudyError(f"`prepare`: {text!r} cannot be read as a command ({one_line(str(error))}).") from None
        if words[0] in ("python", "python3"):
            yield text, [sys.executable, *words[1:]]
        elif "/" in words[0]:
            yield text, words
        else:
            yield text, tool(*words)


def cache_teacher(
    spec: Spec,
    cells: list[Cell],
    devices: Sequence[str],
    environment: Mapping[str, str],
    announce: Announce,
    stop: threading.Event,
) -> None:
    """Let ``sekd cache`` compute the teacher for all cells that read its cache, unless it has done so before."""
    record = _read(spec)
    digests = Digests(spec.output_dir / ".digests.json")
    made_of = {}
    for name, (cell, command) in cache_commands(spec, cells, devices).items():
        source = ingredients.of_training(cell.source, spec.teacher_cache, digests)
        made_of[name] = {key: source[key] for key in ("teacher_cache", "models", "data", "versions")}
        made_of[name]["config"] = {key: cell.source.get(key) for key in (*_TEACHER, *_EXAMPLES)}
        known = record["teacher_cache"].get(name)
        assert spec.teacher_cache is not None
        is_there = spec.teacher_cache.folder.is_dir() and known is not None
        if is_there and ingredients.difference(known, made_of[name]) is None:
            continue
        log = spec.output_dir / "logs" / f"{name}.log"
        with announce(f"the teacher, once, into {spec.teacher_cache.folder}") as report:
            run_child(command, log, lambda: 0.0, report, environment=environment, stop=stop)
        record["teacher_cache"][name] = made_of[name]
        write_json(spec.output_dir / _RECORD, record)


def training_keys() -> frozenset[str]:
    """Return every key that the host reads in a training YAML, ours included.

    A child asks the host, so that the study's own process stays small for as long as it runs.

    Raises:
        StudyError: the host cannot be asked.
    """
    with TemporaryDirectory() as folder:
        done = subprocess.run(tool("sekd", "schema", folder), capture_output=True, text=True, check=False)
        schema = read_json(Path(folder) / "training.json")
    if done.returncode or schema is None:
        raise StudyError(f"The keys of a training cannot be checked: {one_line(done.stderr)[-300:]}")
    return frozenset(schema["properties"])


def cache_commands(spec: Spec, cells: list[Cell], devices: Sequence[str]) -> dict[str, tuple[Cell, list[str]]]:
    """Write a YAML per set of examples and return ``{name: (a cell that has them, the command)}``.

    The teacher runs on all devices, or without ``devices`` on those that this process sees. Raises
    :class:`StudyError` where the cells have several teachers, which one cache cannot hold.
    """
    if spec.teacher_cache is None:
        return {}
    cached = [cell for cell in cells if cell.reads_cache]
    teachers = {str([cell.source.get(key) for key in _TEACHER]): cell for cell in cached}
    if len(teachers) > 1:
        names = ", ".join(str(cell.source.get("teacher_model")) for cell in teachers.values())
        raise StudyError(f"`teacher_cache` holds one teacher, and the cells have several: {names}. Remove the key.")
    firsts: dict[str, Cell] = {}
    for cell in cached:
        firsts.setdefault(str([cell.source.get(key) for key in _EXAMPLES]), cell)
    options = [word for key, value in spec.teacher_cache.options.items() for word in (_option(key), str(value))]
    commands = {}
    for number, cell in enumerate(firsts.values(), start=1):
        name = "teacher_cache" if number == 1 else f"teacher_cache-{number}"
        path = spec.output_dir / f"{name}.yaml"
        words = ["cache", str(path), "--out", str(spec.teacher_cache.folder), *options]
        config = {**cell.source, "output_dir": str(spec.output_dir / "logs")}  # the host makes it, and nothing more
        write_yaml(path, config, f"sekd {shlex.join(words)}")
        commands[name] = (cell, _on_devices(cell, words, count(devices)))
    return commands


def _on_devices(cell: Cell, words: list[str], ranks: int) -> list[str]:
    if ranks < 2 and not cell.source.get("deepspeed"):
        return tool("sekd", *words)
    launch = ("--standalone", "--nproc-per-node", str(max(1, ranks)), "-m", "llamafactory_sekd.cli")
    return tool("torchrun", *launch, *words)


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _read(spec: Spec) -> dict[str, Any]:
    record = read_json(Path(spec.output_dir / _RECORD)) or {}
    return {"prepare": record.get("prepare", []), "teacher_cache": record.get("teacher_cache", {})}
