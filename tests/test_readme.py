"""What the README says of keys and files is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llamafactory_sekd.presets import PRESETS


REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((REPOSITORY / "docs").glob("*.md"))


def test_the_readme_is_short_and_leaves_the_keys_to_the_page_that_is_made_from_them():
    assert len(README.splitlines()) < 150
    assert not re.findall(r"^\| `(?:kd|teacher)_\w+`", README, flags=re.MULTILINE)


def test_every_picture_says_in_words_what_it_shows():
    for page in PAGES:
        for alternative in re.findall(r"!\[([^\]]*)\]", page.read_text(encoding="utf-8")):
            assert alternative.strip(), page.name


def test_every_objective_is_named_in_readme_and_docs():
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
