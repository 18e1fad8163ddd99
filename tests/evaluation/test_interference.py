"""A metric that chose a system's training text is named in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llamafactory_sekd.data.products import record_training_text
from llamafactory_sekd.evaluation.evaluation_results import interfering
from llamafactory_sekd.evaluation.evaluation_settings import System


METRICS = ("bleu", "chrf", "comet")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, chosen_by in (("mbr", "chrF2|nrefs:1"), ("beam", None), ("comet", "comet|model:x")):
        (folder / f"{name}.manifest.json").write_text(json.dumps({"request": {"chosen_by": chosen_by}, "files": {}}))
    info = {name: {"file_name": f"{name}.json"} for name in ("mbr", "beam", "comet")}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def system(folder: Path) -> System:
    return System("student", model={"model_name_or_path": str(folder)})


@pytest.mark.parametrize(
    ("dataset", "metrics"),
    [("mbr", ["bleu", "chrf"]), ("beam", []), ("comet", ["comet"]), ("beam,comet", ["comet"])],
)
@pytest.mark.parametrize("place", ["study", "web", "stage", "checkpoint"])
def test_a_students_training_text_is_found_where_each_way_of_training_leaves_word_of_it(
    tmp_path: Path, data: Path, dataset: str, metrics: list[str], place: str
) -> None:
    model = tmp_path / "cell" / "model"
    model.mkdir(parents=True)
    config = yaml.safe_dump({"dataset": dataset, "dataset_dir": str(data)})
    if place == "study":
        (model.parent / "train.yaml").write_text(config)
    elif place == "web":
        (model / "training_args.yaml").write_text(config)
    else:
        record_training_text(model, data, dataset.split(","))
        model = model / "checkpoint-3" if place == "checkpoint" else model
    assert interfering([system(model)], METRICS) == ({"student": metrics} if metrics else {})


def test_the_report_says_which_scores_not_to_trust() -> None:
    from llamafactory_sekd.evaluation.evaluation_report import _facts

    results = {
        "test_sets": {},
        "template": "parrot",
        "decoding": {"num_beams": 1, "max_new_tokens": 5},
        "interference": {"student": ["bleu", "chrf"]},
    }
    said = dict(_facts(results))["metric interference"]
    assert said == "student was trained on text that BLEU, chrF2 or a relative chose: trust other metrics"
