"""Sentences per second of `llamafactory-cli eval` against the host's own prediction, on WMT22 en-de.

    python benchmarks/generate.py --alma DIR [--sentences 256] [--batch-size 8]

Both sides run the real command on the same model, sentences and generation keys, one after the other, in float32 and
greedy: the host with `do_predict` and `predict_with_generate`, we with the host's batch size and with the token
budget, each by our own greedy search and by transformers' `generate`. The model is random but ends its sentences as a
translator would (tests/helpers/length_model.py), unless --model names a trained one. All outputs must be the same.
Figures are comparable within one run only: the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from llamafactory_sekd.data.prompts import record
from llamafactory_sekd.data.testsets import TestSet, load_test_set
from llamafactory_sekd.errors import one_line
from llamafactory_sekd.files import write_json


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.length_model import save_length_model


DIRECTION = "en-de"
COMMAND = (sys.executable, "-m", "llamafactory_sekd")
# The same evaluation, its sentences sorted by length, as if no model agreed with our own greedy search.
THROUGH_GENERATE = (
    sys.executable,
    "-c",
    "import llamafactory_sekd.evaluation.decoding as decoding; "
    "decoding.agrees_with_plain_forward = lambda *_: False; "
    "import runpy; runpy.run_module('llamafactory_sekd', run_name='__main__')",
)
# Sentences per second, and the translations.
Run = tuple[float, list[str]]


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        test_set = load_test_set("wmt22", arguments.alma, DIRECTION)
        # Every n-th sentence, in file order: WMT22's domains follow one another.
        step = max(1, len(test_set.sources) // arguments.sentences)
        chosen = slice(0, step * arguments.sentences, step)
        sources, references = test_set.sources[chosen], test_set.references[chosen]
        write_data(folder, sources, references, test_set)
        model = arguments.model or save_length_model(
            folder / "model", sources, width=arguments.width, layers=arguments.layers, words=arguments.words
        )
        same_size = {"batch_size": arguments.batch_size, "batch_tokens": 1 << 30}
        contestants: dict[str, Callable[[], Run]] = {
            "host, do_predict": lambda: run_host(folder, model, arguments),
            f"eval, batch_size {arguments.batch_size}": lambda: run_eval(folder, model, same_size, arguments),
            f"eval, batch_tokens {arguments.batch_tokens}": lambda: run_eval(
                folder, model, {"batch_tokens": arguments.batch_tokens}, arguments
            ),
            f"the same through generate, batch_size {arguments.batch_size}": lambda: run_eval(
                folder, model, same_size, arguments, THROUGH_GENERATE
            ),
            f"the same through generate, batch_tokens {arguments.batch_tokens}": lambda: run_eval(
                folder, model, {"batch_tokens": arguments.batch_tokens}, arguments, THROUGH_GENERATE
            ),
        }
        runs: dict[str, list[Run]] = {label: [] for label in contestants}
        for _ in range(arguments.rounds):
            for label, contestant in contestants.items():
                runs[label].append(contestant())
    report(runs, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alma", type=Path, required=True, help="what `sekd data alma` wrote, or a clone of ALMA")
    parser.add_argument("--model", type=Path, help="a trained model instead of the random one")
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument(
        "--rounds", type=int, default=1, help="the best of so many counts, should the machine be shared"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--words", type=int, default=8000, help="half of the random model's vocabulary")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "generate.json")
    return parser.parse_args()


def write_data(folder: Path, sources: tuple[str, ...], references: tuple[str, ...], test_set: TestSet) -> None:
    """Write the same sentences as a dataset for the host and as a test set for us."""
    data = folder / "data"
    data.mkdir()
    records = [record(source, target, test_set.direction) for source, target in zip(sources, references, strict=True)]
    (data / "wmt22.json").write_text(json.dumps(records), encoding="utf-8")
    (data / "dataset_info.json").write_text(json.dumps({"wmt22": {"file_name": "wmt22.json"}}))
    for language, lines in ((test_set.direction.source, sources), (test_set.direction.target, references)):
        (data / f"{DIRECTION}.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def run(folder: Path, command: str, config: dict[str, Any], program: Sequence[str] = COMMAND) -> None:
    path = folder / f"{command}.yaml"
    path.write_text(yaml.safe_dump(config))
    log = folder / "log.txt"
    with open(log, "w") as stream:
        done = subprocess.run(
            [*program, command, str(path)], stdout=stream, stderr=stream, env={**os.environ}, check=False
        )
    if done.returncode != 0:
        sys.exit(log.read_text()[-5000:])


def run_host(folder: Path, model: Path, arguments: argparse.Namespace) -> Run:
    """Return the sentences per second that the host reports (scores included, which take it little) and its output."""
    out = folder / "host"
    run(
        folder,
        "train",
        {
            "model_name_or_path": str(model),
            "stage": "sft",
            "finetuning_type": "full",
            "do_predict": True,
            "predict_with_generate": True,
            "template": "parrot",
            "dataset_dir": str(folder / "data"),
            "eval_dataset": "wmt22",
            "cutoff_len": 2048,
            "output_dir": str(out),
            "overwrite_output_dir": True,
            "per_device_eval_batch_size": arguments.batch_size,
            "do_sample": False,
            "max_new_tokens": arguments.max_new_tokens,
            "report_to": "none",
        },
    )
    speed = json.loads((out / "predict_results.json").read_text())["predict_samples_per_second"]
    predictions = (out / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return speed, [one_line(json.loads(line)["predict"]) for line in predictions]


def run_eval(
    folder: Path,
    model: Path,
    keys: dict[str, int],
    arguments: argparse.Namespace,
    program: Sequence[str] = COMMAND,
) -> Run:
    out = Path(tempfile.mkdtemp(dir=folder)) / "ours"
    run(
        folder,
        "eval",
        {
            "task": "wmt22",
            "task_dir": str(folder / "data"),
            "directions": [DIRECTION],
            "template": "parrot",
            "systems": {"model": {"model_name_or_path": str(model)}},
            "metrics": ["bleu"],
            "max_new_tokens": arguments.max_new_tokens,
            "save_dir": str(out),
            **keys,
        },
        program,
    )
    results = json.loads((out / "results.json").read_text())
    lines = (out / "hypotheses" / "model" / f"{DIRECTION}.txt").read_text(encoding="utf-8").split("\n")[:-1]
    return results["systems"]["model"]["generation"][DIRECTION]["sentences_per_second"], lines


def report(runs: dict[str, list[Run]], arguments: argparse.Namespace) -> None:
    """Print and write each contestant's best round."""
    host_speed, host_lines = max(next(iter(runs.values())))
    rows = []
    table = Table("run", "sentences/s", "times the host", f"same output of {len(host_lines)}")
    for label, rounds in runs.items():
        speed, lines = max(rounds)
        same = sum(ours == theirs for ours, theirs in zip(lines, host_lines, strict=True))
        table.add_row(label, f"{speed:.2f}", f"{speed / host_speed:.2f}", str(same))
        all_speeds = [speed for speed, _ in rounds]
        rows.append({"run": label, "sentences_per_second": all_speeds, "times_host": speed / host_speed, "same": same})
    keys = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    write_json(arguments.out, {"arguments": keys, "runs": rows})
    Console().print(table)


if __name__ == "__main__":
    main()
