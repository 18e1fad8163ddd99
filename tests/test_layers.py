"""Imports point only downward, and only the host's rooms know the host."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "llamafactory_sekd"
# From the top: a room may import those below it. `host` wires the rooms into LLaMA-Factory, so it stands high.
LAYERS = (
    "cli",
    "autoload",
    "host",
    "webui",
    "demo",
    "study",
    "planner",
    "evaluation",
    "trainer",
    "teacher",
    "heads",
    "data",
    "objectives",
    "children",
    "arguments",
    "errors",
)


def imports(path: Path) -> list[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    package = ["llamafactory_sekd", *path.relative_to(PACKAGE).parts[:-1]]
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]

    return names


def room(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "llamafactory_sekd" and len(parts) > 1 and parts[1] in LAYERS else None


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_only_downward(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here in ("__init__", "__main__"):
        return

    assert here in LAYERS, f"{here} has no place in the layers: give it one here and in docs/architecture.md"
    for name in imports(path):
        target = room(name)
        assert target is None or LAYERS.index(target) >= LAYERS.index(here), (
            f"{path} imports {name}, which stands above"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_hosts_rooms_import_the_host(path):
    if path.relative_to(PACKAGE).parts[0] != "host":
        assert not [name for name in imports(path) if name.split(".")[0] == "llamafactory"]
