"""The offline teacher: what a cache costs to build, to keep and to read, and what it loses.

    python benchmarks/cache.py [--smoke] [--steps 7] [--batch-size 8] [--teacher DIR]

Real ALMA sentences, random Llamas (the pair of benchmarks/step.py), float32. Training steps of SFT, of both cache
formats and of the online teacher take turns on the same batches, each run in a process of its own; ratios are medians
within one turn. With ``--teacher``, a folder with a pretrained model, also what top-k keeps of its distributions.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Column, Table
from support.contender import Contender
from support.training import run_benchmark, save_material, step_parser, surroundings, take_turns, training_config

from llamafactory_sekd.cli import apply_plugin


# Models whose teacher a reader may want to keep: width and vocabulary.
KNOWN = {
    "Llama 7B": (4096, 32000),
    "Llama 13B": (5120, 32000),
    "Llama 30B": (6656, 32000),
    "Qwen2.5 7B": (3584, 152064),
    "Qwen2.5 32B": (5120, 152064),
}
GOALS = {"hidden": 1.25, "topk": 1.10}
TOPK_SENTENCES = 96
TOP = (8, 16, 32, 64, 128, 256, 512)


def main() -> None:
    arguments = parse_arguments()
    apply_plugin()
    run_benchmark(measure, report, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = step_parser(__doc__, "cache.json")
    parser.add_argument("--sentences", type=int, default=256, help="sentences in the caches")
    parser.add_argument("--teacher", type=Path, help="a pretrained model, for what top-k keeps")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.steps, arguments.warm_up, arguments.batch_size, arguments.sentences = 2, 1, 4, 16

    return arguments


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Build, read and train, and return what the tables show."""
    material = save_material(folder, arguments.sentences, arguments.smoke)
    config = training_config(
        folder, arguments, stage="sekd", teacher_model=str(folder / "teacher"), output_dir=str(folder / "out")
    )
    building = {kind: build(config, folder / kind, kind) for kind in GOALS}
    halve(folder / "hidden")
    return {
        **surroundings(),
        "data": material.source,
        "parameters": material.sizes,
        "sentences": arguments.sentences,
        "sentences per step": arguments.batch_size,
        "building": building,
        "reading": {kind: reading(config, folder / kind, arguments.batch_size) for kind in GOALS},
        "seconds": steps(folder, config, arguments),
        "largest deviation of a loss over 50 steps": agreement(folder, config, arguments.smoke),
        "topk": None if arguments.teacher is None else topk_errors(arguments.teacher, material.corpus),
    }


def build(config: dict[str, Any], directory: Path, kind: str) -> dict[str, float]:
    """Build a cache; the seconds of the pass, of the teacher's share in it, and the bytes on disk."""
    from llamafactory_sekd.host import cache
    from llamafactory_sekd.teacher import Teacher
    from llamafactory_sekd.teacher.cache.cache_manifest import Settings

    spent = {"pass": 0.0, "teacher": 0.0}
    method = "hidden_states" if kind == "hidden" else "logits"
    with (
        patch.object(cache, "fill", timed(cache.fill, spent, "pass")),
        patch.object(Teacher, method, timed(getattr(Teacher, method), spent, "teacher")),
        patch.dict(os.environ),
    ):
        cache.build_cache(config, directory, Settings(kind), say=lambda _: None)

    return {**spent, "bytes": sum(path.stat().st_size for path in directory.iterdir())}


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        return result

    return wrapper


def reading(config: dict[str, Any], directory: Path, batch_size: int) -> dict[str, float]:
    """What reading adds to collating a batch, in seconds, and to this process, in bytes, after all has been read."""
    from llamafactory_sekd.host.cache import tokenized
    from llamafactory_sekd.teacher.cache.cache_manifest import Manifest
    from llamafactory_sekd.teacher.cache.recorded_teacher import CacheCollator, open_caches

    with patch.dict(os.environ):
        (dataset,) = tokenized(config).datasets

    examples = list(dataset)
    batches = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    collate = CacheCollator(lambda features: {}, open_caches([directory], [Manifest.load(directory)]))
    collate(batches[0])
    before, times = _anonymous_memory(), []
    for _ in range(3):
        for batch in batches:
            start = time.perf_counter()
            collate(batch)
            times.append(time.perf_counter() - start)

    return {"seconds per batch": statistics.median(times), "growth in bytes": _anonymous_memory() - before}


def halve(directory: Path) -> None:
    """Write the examples of a cache into two further ones in turn, `NAME-0` and `NAME-1`."""
    from llamafactory_sekd.teacher.cache.record_store import ShardReader, ShardWriter

    reader = ShardReader(directory)
    halves = [directory.with_name(f"{directory.name}-{number}") for number in range(2)]
    for number, half in enumerate(halves):
        shutil.copytree(directory, half, ignore=shutil.ignore_patterns("shard-*", "index-*"))
        writer = ShardWriter(half, 0)
        for key in sorted(reader.keys())[number::2]:
            record = reader.read(key)
            assert record is not None
            writer.add(key, record)
        writer.flush()


def steps(folder: Path, config: dict[str, Any], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The seconds of the steps of each run."""
    without = {key: value for key, value in config.items() if key != "teacher_model"}
    configs = {
        "sft": {**without, "stage": "sft"},
        "online": config,
        **{kind: {**without, "teacher_cache": str(folder / kind)} for kind in GOALS},
        "two caches": {**without, "teacher_cache": f"{folder / 'hidden-0'},{folder / 'hidden-1'}"},
    }
    if arguments.smoke:
        configs = {name: configs[name] for name in ("sft", "hidden", "two caches")}

    contenders = [
        Contender(name, {**run, "output_dir": str(folder / f"out_{name}")}, folder / f"{name}.log")
        for name, run in configs.items()
    ]
    seconds = take_turns(contenders, arguments.warm_up + arguments.steps)
    for contender in contenders:
        contender.finish()

    return {name: values[arguments.warm_up :] for name, values in seconds.items()}


def agreement(folder: Path, config: dict[str, Any], smoke: bool) -> float:
    """Fifty steps with the teacher and fifty from the cache: the largest relative difference of a loss."""
    from llamafactory.train.tuner import run_exp

    from llamafactory_sekd.trainer import DistillationTrainer

    original, seen = DistillationTrainer.compute_loss, list[list[float]]()

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        seen[-1].append(float(loss))
        return loss

    small = {**config, "max_steps": 4 if smoke else 50, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    cached = {key: value for key, value in small.items() if key != "teacher_model"}
    for run in (small, {**cached, "teacher_cache": str(folder / "hidden")}):
        seen.append([])
        with patch.object(DistillationTrainer, "compute_loss", spy), patch.dict(os.environ):
            run_exp(dict(run))

    return max(abs(ours / theirs - 1) for ours, theirs in zip(*seen, strict=True))


def topk_errors(teacher: Path, pairs: list[Any]) -> dict[str, Any]:
    """What top-k keeps of a pretrained teacher on real text: KL to it, difficulty and hard share of a student.

    Into English, which small pretrained models know. The student's distribution is the teacher's own at temperature
    1.5: a student that has learnt much but not all.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llamafactory_sekd.data.prompts import record
    from llamafactory_sekd.objectives import distillation_loss
    from llamafactory_sekd.teacher.cache.formats import TopKFormat, TopKLogits, bytes_per_token

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, torch_dtype=torch.float32).eval()
    logits, labels = [], []
    with torch.no_grad():
        for source, target, direction in [pair for pair in pairs if pair[2].target == "en"][:TOPK_SENTENCES]:
            item = record(source, target, direction)
            text = f"{item['instruction']}\n{item['input']}\n\n### Response:"
            prompt, response = tokenizer.encode(text), tokenizer.encode(target)[:128]
            ids = torch.tensor([[*prompt, *response]])
            logits.append(model(ids).logits[0, len(prompt) - 1 : -1])
            labels.append(torch.tensor(response))

    teacher_logits, targets = torch.cat(logits), torch.cat(labels)
    student = teacher_logits / 1.5
    exact = distillation_loss(student, teacher_logits, targets)
    rows = {}
    for k in TOP:
        kept = TopKFormat(k, torch.float16, teacher_logits.shape[1])
        source = TopKLogits(kept, kept.compress(teacher_logits))
        found = source.logits(slice(None), torch.empty_like(teacher_logits))
        p, q = torch.log_softmax(teacher_logits, -1), torch.log_softmax(found, -1)
        d = distillation_loss(student, found, targets)
        rows[k] = {
            "bytes": bytes_per_token(kept),
            "tail": float(kept.compress(teacher_logits)["log_tail"].exp().mean()),
            "kl": float((p.exp() * (p - q)).sum(-1).mean()),
            "difficulty": float((d.difficulty - exact.difficulty).abs().mean()),
            "other side of gamma": float((d.hard != exact.hard).float().mean()),
        }

    return {
        "tokens": len(targets),
        "mean difficulty": float(exact.difficulty.mean()),
        "hard share": float(exact.hard.float().mean()),
        "rows": rows,
    }


def report(result: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{result['data']}; {result['machine']}; {result['versions']}", highlight=False)
    sizes = ", ".join(f"{name} {size / 1e6:.1f}M" for name, size in result["parameters"].items())
    console.print(f"{sizes} parameters; {result['sentences per step']} sentences a step", highlight=False)
    table = Table("", "hidden", "topk, k = 64", "online teacher", "Goal")
    table.columns[0].no_wrap = True  # in 80 columns, too, a row is found by its name
    ratios = [f"{ratio(result, name):.2f}" if name in result["seconds"] else "" for name in (*GOALS, "online")]
    table.add_row("step / SFT step, median", *ratios, "1.25, 1.10")
    table.add_row("build / the teacher's passes", *(f"{building(result, kind):.3f}" for kind in GOALS), "", "1.10")
    if "two caches" in result["seconds"]:
        table.add_row("step with two caches / with one", f"{two_caches(result):.3f}", "", "", "1.02")
    waits = [f"{wait(result, kind):.2%}" if kind in result["seconds"] else "" for kind in GOALS]
    table.add_row("reading / step", *waits, "", "2 %")
    growth = [f"{result['reading'][kind]['growth in bytes'] / 2**20:.1f} MiB" for kind in GOALS]
    table.add_row("memory after reading all, thrice", *growth, "", "no growth")
    deviation = result["largest deviation of a loss over 50 steps"]
    table.add_row("loss, 50 steps, largest deviation", f"{deviation:.1e}", "", "", "1e-6")
    console.print(table)
    console.print(bytes_table())
    if result["topk"]:
        console.print(_topk(result["topk"]))


def ratio(result: dict[str, Any], name: str) -> float:
    turns = zip(result["seconds"][name], result["seconds"]["sft"], strict=True)
    return statistics.median(ours / sft for ours, sft in turns)


def two_caches(result: dict[str, Any]) -> float:
    turns = zip(result["seconds"]["two caches"], result["seconds"]["hidden"], strict=True)
    return statistics.median(two / one for two, one in turns)


def building(result: dict[str, Any], kind: str) -> float:
    return result["building"][kind]["pass"] / result["building"][kind]["teacher"]


def wait(result: dict[str, Any], kind: str) -> float:
    return result["reading"][kind]["seconds per batch"] / statistics.median(result["seconds"][kind])


def bytes_table(log_probs: str = "float16") -> Table:
    """What a response token takes; the type of log-probabilities is the cache's, unless another is named."""
    import torch

    from llamafactory_sekd.teacher.cache.formats import HiddenFormat, TopKFormat, bytes_per_token

    what = Column("Bytes per response token", no_wrap=True)
    table = Table(what, "hidden, bfloat16", f"top-64, {log_probs}", "all logits, bfloat16")
    for name, (width, vocab) in KNOWN.items():
        hidden = bytes_per_token(HiddenFormat(width, torch.bfloat16))
        top = bytes_per_token(TopKFormat(64, getattr(torch, log_probs), vocab))
        table.add_row(name, f"{hidden:,}", f"{top:,}", f"{2 * vocab:,}")

    return table


def _topk(found: dict[str, Any]) -> Table:
    title = (
        f"top-k of the pretrained teacher: {found['tokens']:,} tokens, mean d {found['mean difficulty']:.3f}, "
        f"hard share {found['hard share']:.1%}"
    )
    columns = (
        "k",
        "bytes",
        "mass of the tail",
        "KL to the exact p",
        "mean change of d",
        "tokens that change side of Γ",
    )
    table = Table(*columns, title=title)
    for k, row in found["rows"].items():
        numbers = (f"{row['tail']:.2%}", f"{row['kl']:.2e}", f"{row['difficulty']:.2e}")
        table.add_row(str(k), f"{row['bytes']:,}", *numbers, f"{row['other side of gamma']:.2%}")

    return table


def _anonymous_memory() -> int:
    """Bytes of this process that no file backs (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
