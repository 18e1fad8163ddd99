"""The files around the package agree with it: versions, commands, paths."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from llamafactory_sekd import __version__


REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def commands(workflow: Path) -> list[str]:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_there_is_a_workflow_for_tests_the_matrix_the_site_and_a_release():
    assert [path.stem for path in WORKFLOWS] == ["ci", "docs", "matrix", "release"]
    ran = [command for path in WORKFLOWS for command in commands(path)]
    assert {"make lint", "make test", "make docs", "make package"} <= set(ran)


def test_every_make_target_of_a_workflow_exists():
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    used = {target for path in WORKFLOWS for run in commands(path) for target in re.findall(r"make ([\w-]+)", run)}
    assert used <= targets


def test_the_pythons_of_the_classifiers_are_those_of_the_matrix():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">={named[0]}"
    matrix = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "matrix.yml").read_text())
    assert matrix["jobs"]["newest"]["strategy"]["matrix"]["python"] == named
    assert re.search(r"^PYTHONS = (.*)$", (REPOSITORY / "noxfile.py").read_text(), re.MULTILINE)[1] == str(
        named
    ).replace("'", '"')


def test_the_citation_has_the_packages_version_and_license():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])


def test_the_image_copies_files_that_exist():
    copied = re.findall(r"^COPY (.*) \S+$", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert {"pyproject.toml", "README.md", "LICENSE", "llamafactory_sekd", "examples"} <= set(names)
    assert all((REPOSITORY / name).exists() for name in names)


def test_no_two_modules_of_the_package_share_a_name():
    names = [path.stem for path in (REPOSITORY / "llamafactory_sekd").rglob("*.py") if path.stem != "__init__"]
    assert sorted(names) == sorted(set(names))
