"""Two tiny models that end their sentences, and a small test set in two directions, shared by the tests of the
evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.sentences import ENGLISH, GERMAN, write_lines


# A machine that runs several tests at a time is slowest when each of them takes all cores.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random models whose outputs end after about as many tokens as the source has."""
    from helpers.length_model import save_length_model

    folder = tmp_path_factory.mktemp("models")
    return {name: save_length_model(folder / name, ENGLISH, seed=seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture(scope="session")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English and German, ten sentences in both directions."""
    folder = tmp_path_factory.mktemp("task")
    for direction in ("en-de", "de-en"):
        write_lines(folder / f"{direction}.en", ENGLISH)
        write_lines(folder / f"{direction}.de", GERMAN)
    return folder


@pytest.fixture(scope="session")
def human(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Translations by a system that is only scored: nearly the references."""
    folder = tmp_path_factory.mktemp("human")
    write_lines(folder / "en-de.txt", [line.replace("die", "diese") for line in GERMAN])
    write_lines(folder / "de-en.txt", [line.replace("the", "this") for line in ENGLISH])
    return folder


@pytest.fixture
def config(models: dict[str, Path], task_dir: Path, human: Path, tmp_path: Path) -> dict[str, Any]:
    """The keys of an evaluation that runs, for tests to change."""
    return {
        "task": "wmt22",
        "task_dir": str(task_dir),
        "directions": ["en-de", "de-en"],
        "template": "parrot",
        "systems": {
            "one": {"model_name_or_path": str(models["one"])},
            "two": {"model_name_or_path": str(models["two"])},
            "human": {"hypotheses": str(human)},
        },
        "baseline": "one",
        "teacher": "two",
        "metrics": ["bleu", "chrf"],
        "max_new_tokens": 48,
        "save_dir": str(tmp_path / "results"),
    }


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(config: dict[str, Any]) -> Path:
        path = tmp_path / "eval.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    return write
