"""What the student's own text and the teacher's text cost: generation, a step, `sekd translate`, MBR.

    python benchmarks/on_policy.py [--smoke] [--rounds 3] [--only generation,step,translate,mbr]

Ratios within one run, on ALMA's sentences, in float32 on one thread: a student of 20 and a teacher of 60 million
parameters that end their sentences as translators do (tests/helpers/length_model.py).

- generation: the samples of a step, 4 micro-batches of 8, against `model.generate` per micro-batch, padded, as TRL's
  GKD trainer calls it;
- step: an on-policy step against an SFT step on the same text, the teacher's forward pass and the generation; and one
  of four steps that use the same samples (`kd_on_policy_every: 4`) against a step that draws its own;
- translate: `sekd translate` against the host's `do_predict`, sentences per second, the same output;
- mbr: choosing among 16 samples by chrF against generating them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from support.material import sentence_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_sekd.data.prompts import prompt, record
from llamafactory_sekd.errors import one_line
from llamafactory_sekd.evaluation.decoding import Drawing, SeededPrompt, hf_candidates
from llamafactory_sekd.evaluation.evaluation_settings import Decoding
from llamafactory_sekd.evaluation.greedy import greedy_search
from llamafactory_sekd.evaluation.systems import BatchLimits
from llamafactory_sekd.files import write_atomic
from llamafactory_sekd.objectives import Head, fused_distillation
from llamafactory_sekd.trainer.on_policy import TOKENS_AT_A_TIME
from llamafactory_sekd.trainer.sampling import RowDraws, Sampling
from llamafactory_sekd.translation.choosing import by_consensus, chrf_utility


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.length_model import EOS, PAD, save_length_model


GOALS = {"generation": 0.4, "step": 1.05, "translate": 3.0, "mbr": 1.2}
MICRO_BATCHES, ROWS, NEW_TOKENS = 4, 8, 128


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    pairs, origin = sentence_pairs(2000)
    english = [pair for pair in pairs if str(pair[2]) == "en-de"]
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "data": origin,
        "versions": {name: version(name) for name in ("torch", "transformers", "llamafactory")},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = {"width": 64, "layers": 2, "words": 400} if arguments.smoke else {}
        sources = [source for source, _, _ in english]
        student = save_length_model(folder / "student", sources, **{"width": 384, "layers": 6, "words": 8000, **small})
        teacher = save_length_model(folder / "teacher", sources, **{"width": 640, "layers": 9, "words": 8000, **small})
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "generation": lambda: generation(student, english, arguments),
            "step": lambda: step(student, teacher, english, arguments),
            "translate": lambda: translate(folder, student, english, arguments),
            "mbr": lambda: mbr(student, english, arguments),
        }
        for part in arguments.only.split(","):
            result[part] = parts[part]()
            print(part, result[part], flush=True)
    report(result)
    write_atomic(arguments.out, json.dumps(result, indent=2).encode())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=96, help="of `translate` and `mbr`")
    parser.add_argument("--only", default=",".join(GOALS))
    parser.add_argument("--smoke", action="store_true", help="tiny models, one round: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "on_policy.json")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.sentences = 1, 16
    return arguments


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts_of(folder: Path, pairs: Sequence[Any], count: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [prompt(source, direction) for source, _, direction in pairs[:count]]
    return [[0, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]


def our_samples(model: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Sample as a training step does: all micro-batches together."""
    sampling = Sampling(True, 1.0, 1.0, 0, NEW_TOKENS, (EOS,), PAD)
    draws = RowDraws(sampling, range(len(prompts)))
    with torch.no_grad():
        groups = greedy_search(model, prompts, [EOS], PAD, NEW_TOKENS, BatchLimits(TOKENS_AT_A_TIME), draws)
        rows = dict(entry for group in groups for entry in group)
    return [until_stop(rows[place]) for place in range(len(prompts))]


def padded_samples(model: Any, prompts: Sequence[list[int]]) -> None:
    """Sample a micro-batch at a time, padded to the longest example of the step, as a GKD trainer does."""
    width = max(map(len, prompts))
    for start in range(0, len(prompts), ROWS):
        rows = prompts[start : start + ROWS]
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        mask = (torch.arange(width) >= torch.tensor([[width - len(row)] for row in rows])).long()
        with torch.no_grad():
            model.generate(
                ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS, eos_token_id=EOS,
                pad_token_id=PAD,
            )  # fmt: skip


def until_stop(row: list[int]) -> list[int]:
    return row[: row.index(EOS) + 1] if EOS in row else row


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(rounds: int, **works: Callable[[], Any]) -> dict[str, list[float]]:
    """Time each work once a round, after a round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            taken = seconds(work)
            if number:
                times[name].append(taken)
    return times


def generation(folder: Path, pairs: Sequence[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    model = load(folder)
    prompts = prompts_of(folder, pairs, MICRO_BATCHES * ROWS)
    times = in_turns(
        arguments.rounds, ours=lambda: our_samples(model, prompts), padded=lambda: padded_samples(model, prompts)
    )
    ratios = [a / b for a, b in zip(times["ours"], times["padded"], strict=True)]
    lengths = [len(row) for row in our_samples(model, prompts)]
    return {"ratio": statistics.median(ratios), "seconds": times, "mean_length": statistics.mean(lengths)}


def step(student: Path, teacher: Path, pairs: Sequence[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare an on-policy step with its parts, by the functions that the trainer calls."""
    model = load(student)
    frozen = load(teacher)
    prompts = prompts_of(student, pairs, ROWS)
    made = our_samples(model, prompts)
    head, their_head = model.get_output_embeddings(), frozen.get_output_embeddings()

    def batch(samples: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = [p + s for p, s in zip(prompts, samples, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        mask = (ids != PAD).long()
        predicts = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (p, s) in enumerate(zip(prompts, samples, strict=True)):
            predicts[row, len(p) - 1 : len(p) + len(s) - 1] = True
        return ids, mask, predicts, ids.roll(-1, 1)[predicts]

    def sft(samples: Sequence[list[int]]) -> None:
        ids, mask, predicts, targets = batch(samples)
        logits = head(model.model(ids, attention_mask=mask).last_hidden_state[predicts])
        torch.nn.functional.cross_entropy(logits, targets).backward()
        model.zero_grad()

    def ask(samples: Sequence[list[int]]) -> torch.Tensor:
        ids, mask, predicts, _ = batch(samples)
        with torch.no_grad():
            return frozen.model(ids, attention_mask=mask).last_hidden_state[predicts]

    def train(samples: Sequence[list[int]]) -> None:
        ids, mask, predicts, targets = batch(samples)
        answer = Head(ask(samples), their_head.weight, None, len(their_head.weight), torch.float32)
        hidden = model.model(ids, attention_mask=mask).last_hidden_state[predicts]
        output = fused_distillation(
            hidden, head.weight, answer, targets, num_items=torch.tensor(len(targets)), kd_loss="reverse_kl",
            kd_lambda=1.0,
        )  # fmt: skip
        output.loss.backward()
        model.zero_grad()

    def on_policy(steps: int) -> None:
        samples = our_samples(model, prompts)
        for _ in range(steps):
            train(samples)

    times = in_turns(
        arguments.rounds,
        each=lambda: on_policy(1),
        four=lambda: on_policy(4),
        sft=lambda: sft(made),
        teacher=lambda: their_head(ask(made)),
        generation=lambda: our_samples(model, prompts),
    )
    ratios = [step / (a + b + c) for step, _, a, b, c in zip(*times.values(), strict=True)]
    used = [four / 4 / each for each, four in zip(times["each"], times["four"], strict=True)]
    return {"ratio": statistics.median(ratios), "four_uses": statistics.median(used), "seconds": times}


def translate(folder: Path, model: Path, pairs: Sequence[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = pairs[: arguments.sentences]
    data = folder / "data"
    data.mkdir()
    (data / "text.json").write_text(json.dumps([record(*pair) for pair in chosen]))
    (data / "dataset_info.json").write_text(json.dumps({"text": {"file_name": "text.json"}}))
    keys = {
        "model_name_or_path": str(model), "stage": "sft", "finetuning_type": "full", "do_predict": True,
        "predict_with_generate": True, "template": "parrot", "dataset_dir": str(data), "eval_dataset": "text",
        "cutoff_len": 2048, "output_dir": str(folder / "host"), "overwrite_output_dir": True,
        "per_device_eval_batch_size": 8, "do_sample": False, "max_new_tokens": NEW_TOKENS, "report_to": "none",
    }  # fmt: skip
    (folder / "predict.yaml").write_text(yaml.safe_dump(keys))
    run("-m", "llamafactory_sekd", "train", str(folder / "predict.yaml"))
    theirs = json.loads((folder / "host" / "predict_results.json").read_text())["predict_samples_per_second"]
    predicted = (folder / "host" / "generated_predictions.jsonl").read_text().splitlines()
    out = folder / "out.txt"
    run(
        "-m", "llamafactory_sekd.cli", "translate", "--model", str(model), "--dataset", "text", "--dataset-dir",
        str(data), "--max-new-tokens", str(NEW_TOKENS), "--out", str(out),
    )  # fmt: skip
    meta = json.loads((folder / "out.txt.work" / "1-of-1.meta.json").read_text())
    same = sum(
        one_line(json.loads(line)["predict"]) == ours
        for line, ours in zip(predicted, out.read_text().splitlines(), strict=True)
    )
    ours = len(chosen) / meta["seconds"]
    return {"ratio": ours / theirs, "ours_per_second": ours, "host_per_second": theirs, "same": same / len(chosen)}


def mbr(folder: Path, pairs: Sequence[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    model = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count, samples = max(4, arguments.sentences // 4), 16
    prompts = prompts_of(folder, pairs, count)
    sample = hf_candidates(
        model, lambda rows: tokenizer.batch_decode(rows, skip_special_tokens=True), [EOS], PAD,
        Decoding(max_new_tokens=NEW_TOKENS), drawing=Drawing(),
    )  # fmt: skip
    requests = [SeededPrompt(row, number * samples + k) for number, row in enumerate(prompts) for k in range(samples)]
    start = time.perf_counter()
    found = dict(entry for group in sample(requests, BatchLimits(16384)) for entry in group)
    generating = time.perf_counter() - start
    start = time.perf_counter()
    for number in range(count):
        texts = [found[number * samples + k][0].text for k in range(samples)]
        by_consensus(number, texts, chrf_utility)
    choosing = time.perf_counter() - start
    return {
        "ratio": (generating + choosing) / generating,
        "minutes_per_1000": (generating + choosing) / count * 1000 / 60,
        "choosing_seconds_per_1000": choosing / count * 1000,
    }


def run(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr[-5000:])


def report(result: dict[str, Any]) -> None:
    table = Table("", "goal", "measured", title="Own text and the teacher's, ratios of one run")
    words = {
        "generation": "generation of a step / padded generate per micro-batch",
        "step": "on-policy step / (SFT step + teacher forward + generation)",
        "translate": "sekd translate / the host's do_predict, sentences per second",
        "mbr": "16 samples and chrF-MBR / the samples alone",
    }
    for part, goal in GOALS.items():
        if part in result:
            sign = "at least" if part == "translate" else "at most"
            table.add_row(words[part], f"{sign} {goal}", f"{result[part]['ratio']:.2f}")
    if "step" in result:
        words_of_uses = "a step of four that use the same samples / one that draws its own"
        table.add_row(words_of_uses, "", f"{result['step']['four_uses']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
