"""A small study as its results.json describes it: three systems, two values of a key, three seeds, real scores.

The translations are the references with words lost, swapped or replaced, more of them for the weaker systems.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.data.prompts import instruction


DIRECTIONS = ("en-de", "de-en")
SEEDS = (1, 2, 3)
RATES = (0.0005, 0.001)
# Share of the words that are spoiled, at the first and at the second learning rate.
SYSTEMS = {"SFT": (0.34, 0.30), "Forward KD": (0.26, 0.30), "Self-Evolution KD": (0.22, 0.12)}
TEACHER = ("Teacher", 0.05)
_SUBJECTS = ("Der Nachbar", "Die Lehrerin", "Ein alter Freund", "Das Kind", "Unsere Kollegin", "Der Fahrer")
_VERBS = ("öffnet", "sucht", "findet", "verkauft", "repariert", "zeigt")
_OBJECTS = ("das Fenster", "einen Schlüssel", "die Zeitung", "den Brief", "ein Fahrrad")
_PLACES = ("am Bahnhof", "im Garten hinter dem Haus", "auf dem Markt", "vor der Schule", "in Hamburg")
_ENGLISH = {
    "Der Nachbar": "The neighbor", "Die Lehrerin": "The teacher", "Ein alter Freund": "An old friend",
    "Das Kind": "The child", "Unsere Kollegin": "Our colleague", "Der Fahrer": "The driver",
    "öffnet": "opens", "sucht": "looks for", "findet": "finds", "verkauft": "sells", "repariert": "repairs",
    "zeigt": "shows", "das Fenster": "the window", "einen Schlüssel": "a key", "die Zeitung": "the newspaper",
    "den Brief": "the letter", "ein Fahrrad": "a bicycle", "am Bahnhof": "at the station",
    "im Garten hinter dem Haus": "in the garden behind the house", "auf dem Markt": "at the market",
    "vor der Schule": "in front of the school", "in Hamburg": "in Hamburg",
}  # fmt: skip


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """English and German, one sentence each."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        parts = [rng.choice(words) for words in (_SUBJECTS, _VERBS, _OBJECTS, _PLACES)]
        pairs.append((" ".join(_ENGLISH[part] for part in parts) + ".", " ".join(parts) + "."))
    return pairs


def spoiled(text: str, share: float, rng: random.Random) -> str:
    """Lose, double or replace a share of the words."""
    words = []
    for word in text.split():
        luck = rng.random()
        if luck > share:
            words.append(word)
        elif luck > share / 2:
            words += [word, word] if luck > 0.8 * share else ["etwas"]
    return " ".join(words)


def write_study(folder: Path, count: int = 40) -> dict[str, Any]:
    """Write everything that results.json points to below ``folder`` and return its contents."""
    pairs = sentences(count, seed=5)
    targets = {"en-de": [german for _, german in pairs], "de-en": [english for english, _ in pairs]}
    task = folder / "task"
    task.mkdir(parents=True)
    for direction in DIRECTIONS:
        for language, lines in (("en", targets["de-en"]), ("de", targets["en-de"])):
            (task / f"{direction}.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    _write_training(folder / "data")

    cells = []
    for system, shares in SYSTEMS.items():
        for rate, share in zip(RATES, shares, strict=True):
            for seed in SEEDS:
                cells.append(_cell(folder, system, rate, share, seed, targets))
    name, share = TEACHER
    teacher = _evaluated(folder, name, share, 0, targets)
    teacher_lines = {direction: _lines(folder / path) for direction, path in teacher["hypotheses"].items()}
    for cell in cells:
        similarity = {
            direction: BLEU().corpus_score(_lines(folder / path), [teacher_lines[direction]]).score
            for direction, path in cell["hypotheses"].items()
        }
        cell["similarity"] = {**similarity, "average": sum(similarity.values()) / 2}
    return {
        "schema_version": 1,
        "study": "small",
        "spec": {
            "output_dir": str(folder),
            "systems": {system: {} for system in SYSTEMS},
            "models": {name: {"model_name_or_path": "teacher"}},
            "matrix": {"learning_rate": list(RATES)},
            "seeds": list(SEEDS),
            "baseline": "SFT",
            "teacher": name,
            "select": {"key": "learning_rate", "metric": "nll", "mode": "min"},
        },
        "directions": list(DIRECTIONS),
        "metrics": ["bleu", "chrf"],
        "test_set": {"task": "wmt22", "task_dir": str(task)},
        "cells": cells,
        "models": [{"name": name, "folder": "teacher", "similarity": None, "guards": {}, **teacher}],
        "selection": [_selection(cells, system) for system in SYSTEMS],
    }


def without_select(results: dict[str, Any]) -> dict[str, Any]:
    """The same study with all settings side by side."""
    spec = {key: value for key, value in results["spec"].items() if key != "select"}
    return {**results, "spec": spec, "selection": []}


def _cell(folder: Path, system: str, rate: float, share: float, seed: int, targets: dict[str, list[str]]) -> dict:
    name = f"{system}_{rate}_{seed}".replace(" ", "-")
    rng = random.Random(name)
    nll = 1.5 + share + 0.02 * rng.random()
    history = folder / "cells" / name / "trainer_state.json"
    history.parent.mkdir(parents=True)
    history.write_text(json.dumps({"log_history": list(_log(system, nll, rng))}), encoding="utf-8")
    evaluation = _evaluated(folder, name, share, seed, targets)
    return {
        "id": name,
        "system": system,
        "axes": {"learning_rate": rate},
        "seed": seed,
        "folder": f"cells/{name}",
        "model": f"cells/{name}/model",
        "config": {
            "stage": "sft" if system == "SFT" else "sekd",
            **({} if system == "SFT" else {"kd_loss": system.lower().replace(" kd", "_kl").replace("-", "_")}),
            "learning_rate": rate,
            "dataset": "small_train",
            "dataset_dir": str(folder / "data"),
            "template": "parrot",
            "seed": seed,
            "output_dir": name,
        },
        "training": {"seconds": 30.0 + seed + len(system), "steps": 300, "samples_per_second": 9.5, "resumed": False},
        "validation": {"nll": nll, "eval_loss": nll, "eval_kd/agreement": 0.5 + share / 4},
        "history": str(history.relative_to(folder)),
        "guards": {d: {"empty": 0.0, "wrong_language": 0.01, "repetition": 0.0, "hit_max_new_tokens": 0.0,
                       "length_ratio": 0.9} for d in DIRECTIONS},
        **evaluation,
    }  # fmt: skip


def _evaluated(folder: Path, name: str, share: float, seed: int, targets: dict[str, list[str]]) -> dict[str, Any]:
    rng = random.Random(f"{name}{seed}")
    paths, scores = {}, {}
    for direction, references in targets.items():
        path = folder / "hypotheses" / name / f"{direction}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [spoiled(reference, share, rng) for reference in references]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        paths[direction] = str(path.relative_to(folder))
        scores[direction] = {
            "bleu": BLEU().corpus_score(lines, [references]).score,
            "chrf": CHRF().corpus_score(lines, [references]).score,
        }
    average = {metric: sum(row[metric] for row in scores.values()) / len(scores) for metric in ("bleu", "chrf")}
    return {"scores": {**scores, "average": average}, "hypotheses": paths, "segment_scores": {}}


def _log(system: str, nll: float, rng: random.Random) -> Any:
    for step in range(10, 301, 10):
        left = 1 - step / 300
        entry = {"step": step, "loss": nll + 1.5 * left + 0.05 * rng.random()}
        if system != "SFT":
            entry |= {
                "kd/ce": nll + left, "kd/difficulty": 0.8 + left, "kd/agreement": 0.5 - 0.2 * left,
                "kd/hard_ratio": (0.3 + 0.2 * left) if system.startswith("Self") else 0.0,
            }  # fmt: skip
        yield entry
        if step % 100 == 0:
            known = {} if system == "SFT" else {"eval_kd/ce": nll + left, "eval_kd/agreement": 0.5 - 0.2 * left}
            yield {"step": step, "eval_loss": nll + left, **known}


def _selection(cells: list[dict[str, Any]], system: str) -> dict[str, Any]:
    by_value = []
    for rate in RATES:
        own = [c["validation"]["nll"] for c in cells if c["system"] == system and c["axes"]["learning_rate"] == rate]
        by_value.append({"value": rate, "mean": sum(own) / len(own), "seeds": len(own)})
    best = min(by_value, key=lambda row: row["mean"])["value"]
    return {"system": system, "axes": {}, "key": "learning_rate", "value": best, "metric": "nll", "mode": "min",
            "by_value": by_value}  # fmt: skip


def _write_training(folder: Path) -> None:
    folder.mkdir()
    records = []
    for english, german in sentences(60, seed=6):
        records.append({"instruction": instruction(parse_direction("en-de")), "input": english, "output": german})
        records.append({"instruction": instruction(parse_direction("de-en")), "input": german, "output": english})
    (folder / "train.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"small_train": {"file_name": "train.json"}}))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
