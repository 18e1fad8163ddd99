"""The JSON schemas: current, named by every example, and as strict as the readers of the files."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from helpers.forks import forked
from jsonschema import Draft7Validator
from referencing import Registry, Resource


REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "docs" / "schema"
EXAMPLES = sorted((REPOSITORY / "examples").rglob("*.yaml"))
NAMED = re.compile(r"# yaml-language-server: \$schema=(\S+)\n")
SCHEMAS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")}
REGISTRY = Registry().with_resources([(name, Resource.from_contents(entry)) for name, entry in SCHEMAS.items()])


def errors(name: str, config: dict) -> list[str]:
    found = Draft7Validator(SCHEMAS[name], registry=REGISTRY).iter_errors(config)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in found]


def test_the_committed_schemas_are_what_the_command_writes(tmp_path):
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), flags=re.MULTILINE))
    if any(version(name) != pinned[name] for name in ("llamafactory", "transformers")):
        pytest.skip("the committed schemas are those of the versions in constraints.txt")
    done = forked(["sekd", "schema", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    for path in FOLDER.glob("*.json"):
        assert (tmp_path / path.name).read_text() == path.read_text(), "run `sekd schema`"
    assert {path.name for path in tmp_path.iterdir()} == SCHEMAS.keys()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_names_its_schema_in_its_first_line_and_holds_to_it(path):
    named = NAMED.match(path.read_text(encoding="utf-8"))
    assert named, "the first line must name the schema"
    schema = (path.parent / named[1]).resolve()
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    kind = "training" if "stage" in config else "evaluation" if "task" in config else "study"
    assert schema == FOLDER / f"{kind}.json"
    assert errors(schema.name, config) == []


@pytest.mark.parametrize(
    ("name", "config", "place"),
    [
        ("training.json", {"stage": "sekd", "kd_gama": 0.4}, "kd_gama"),
        ("training.json", {"stage": "skd"}, "stage"),
        ("training.json", {"kd_loss": "kl"}, "kd_loss"),
        ("training.json", {"learning_rate": "fast"}, "learning_rate"),
        ("evaluation.json", {"task": "t", "directions": ["en-de"], "systems": {"a": {}}}, "save_dir"),
        ("evaluation.json", {"metrics": ["blue"]}, "metrics.0"),
        ("study.json", {"system": {}}, "system"),
        ("study.json", {"systems": {"A": {"kd_lambda": "half"}}}, "systems.A.kd_lambda"),
        ("study.json", {"matrix": {"kd_gamma": 0.4}}, "matrix.kd_gamma"),
        ("study.json", {"matrix": {"kd_beeta": [0.4]}}, "kd_beeta"),
    ],
)
def test_a_mistake_is_marked_where_it_is(name, config, place):
    assert any(place in error for error in errors(name, config))


@pytest.mark.parametrize(("name", "page"), [("evaluation.json", "evaluation.md"), ("study.json", "study.md")])
def test_the_schema_and_the_page_have_the_same_keys(name, page):
    table = re.search(r"^\| key \|.*\n((?:\|.*\n)+)", (REPOSITORY / "docs" / page).read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"^\| `(\w+)` \|", table[1], flags=re.MULTILINE)) == SCHEMAS[name]["properties"].keys()


def test_descriptions_have_no_escapes_of_the_command_line():
    assert not [name for name, schema in SCHEMAS.items() if "%%" in json.dumps(schema)]
