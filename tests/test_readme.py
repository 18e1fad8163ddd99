"""What the README says of keys and files is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llamafactory_sekd.arguments import KEYS, DistillationArguments
from llamafactory_sekd.presets import PRESETS


REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((REPOSITORY / "docs").glob("*.md"))


def test_the_keys_table_holds_every_key_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \|\s*(.*?)\s*\|", README, flags=re.MULTILINE))
    assert set(rows) == set(KEYS)
    for key, shown in rows.items():
        default = DistillationArguments.__dataclass_fields__[key].default
        words = {None: ("", "chosen", "false")}
        assert shown.strip("`") in words.get(default, (str(default),))


def test_every_objective_stands_in_readme_and_docs():
    objectives = (REPOSITORY / "docs" / "objectives.md").read_text(encoding="utf-8")
    for name in PRESETS:
        assert f"`{name}`" in README
        assert f"| `{name}` |" in objectives


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_or_runs_is_there(page):
    text = page.read_text(encoding="utf-8")
    linked = [link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) if "://" not in link]
    for link in linked:
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for example in re.findall(r"examples/yamls/[\w.]+\.yaml", text):
        assert (REPOSITORY / example).exists(), f"{page.name} names {example}"
