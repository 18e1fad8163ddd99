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


# A machine that runs several tests at a time is slowest when each of them takes all cores.
os.environ["OMP_NUM_THREADS"] = "1"

ENGLISH = [
    "The house stands near the river.",
    "Yesterday the two old friends met again in the small café behind the station, and talked until it closed.",
    "No.",
    "She bought three books, a map of the city and a bottle of water before the train left for the north.",
    "Where is the nearest hospital?",
    "The committee has postponed its decision until next week because several members were absent.",
    "It rains.",
    "I would like to return the shoes that I ordered last month, because they are too small for me.",
    "Our dog sleeps under the table.",
    "After the storm, many trees lay across the road and the fire brigade worked through the whole night.",
]
GERMAN = [
    "Das Haus steht in der Nähe des Flusses.",
    "Gestern trafen sich die zwei alten Freunde im kleinen Café hinter dem Bahnhof und redeten bis zum Schluss.",
    "Nein.",
    "Sie kaufte drei Bücher, einen Stadtplan und eine Flasche Wasser, bevor der Zug nach Norden abfuhr.",
    "Wo ist das nächste Krankenhaus?",
    "Der Ausschuss hat seine Entscheidung auf nächste Woche verschoben, weil mehrere Mitglieder fehlten.",
    "Es regnet.",
    "Ich möchte die Schuhe zurückgeben, die ich letzten Monat bestellt habe, weil sie mir zu klein sind.",
    "Unser Hund schläft unter dem Tisch.",
    "Nach dem Sturm lagen viele Bäume auf der Straße, und die Feuerwehr arbeitete die ganze Nacht.",
]


def write_lines(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random models whose outputs end after about as many tokens as the source has."""
    from length_model import save_length_model

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
