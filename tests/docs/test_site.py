"""The documentation's site: built strictly, complete, and in a real browser without a request to another host."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamafactory_sekd.arguments import KEYS


pytest.importorskip("material", reason='the site needs `pip install -e ".[docs]"`')

REPOSITORY = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    result = build(REPOSITORY / "mkdocs.yml", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_page_of_docs_and_every_example_is_part_of_the_site(site: Path) -> None:
    sources = [*(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "examples").rglob("*.yaml")]
    for source in sources:
        name = source.relative_to(REPOSITORY).as_posix().removeprefix("docs/")
        assert (site / name).with_suffix(".html").is_file(), name
    for name in ("index", "CONTRIBUTING", "CHANGELOG", "keys"):
        assert (site / f"{name}.html").is_file()


def test_the_page_of_keys_has_every_key_of_the_stage(site: Path) -> None:
    page = (site / "keys.html").read_text(encoding="utf-8")
    assert set(re.findall(r'<h3 id="(\w+)"', page)) == set(KEYS)


def test_links_lead_to_pages_and_are_not_called_by_file_names(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<a [^>]*href="(?!https?:)[^"]*\.(?:md|yaml)"|<a [^>]*>[\w/]+\.md</a>', text), page.name


def test_every_picture_has_a_text_that_says_what_it_shows(site: Path) -> None:
    pictures = [
        (page.name, picture)
        for page in site.rglob("*.html")
        for picture in re.findall(r"<img [^>]*>", page.read_text(encoding="utf-8"))
    ]
    assert len(pictures) >= 5
    assert [place for place in pictures if not re.search(r'alt="[^"]{20,}"', place[1])] == []


def test_a_broken_link_and_a_page_outside_of_the_navigation_stop_the_build(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    (tmp_path / "docs" / "stray.md").write_text("[nowhere](nowhere.md) [no heading](data.md#nowhere)\n")
    config = tmp_path / "mkdocs.yml"
    hooks = REPOSITORY / "docs" / "site" / "hooks.py"
    config.write_text(f"INHERIT: {REPOSITORY / 'mkdocs.yml'}\ndocs_dir: {tmp_path / 'docs'}\nhooks: [{hooks}]\n")
    result = build(config, tmp_path / "site")
    assert result.returncode != 0
    warned = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("WARNING")]
    for complaint in ("'nowhere.md'", "'data.md#nowhere'", 'not included in the "nav"'):
        assert any(complaint in line for line in warned), result.stdout + result.stderr


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    if not Path(CHROMIUM).is_file():
        pytest.skip("the browser tests need chromium (apt-get install chromium)")
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_opened_from_the_disk_the_site_asks_no_host_shows_its_pictures_and_finds_words(
    site: Path, browser: Any
) -> None:
    page = browser.new_page()
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("requestfailed", lambda request: errors.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    for name in ("index", "objectives", "keys", "demo"):
        page.goto((site / f"{name}.html").as_uri())
        page.wait_for_load_state("networkidle")
        broken = "[...document.images].filter(i => i.loading !== 'lazy' && !i.naturalWidth).map(i => i.src)"
        assert page.evaluate(broken) == []
    page.locator(".md-search__input").fill("kd_gamma")
    page.locator(".md-search-result__link").first.wait_for(timeout=1_200_000)  # until the index is made
    page.close()
    assert not errors
    assert {url.split(":", 1)[0] for url in requests} <= {"file", "data", "blob", "about"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_have_no_serious_accessibility_finding_and_typeset_equations(
    site: Path, browser: Any, scheme: str
) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python"
    ).Axe()
    page = browser.new_page(viewport={"width": 1280, "height": 1000}, color_scheme=scheme)
    found = []
    for name in ("index", "objectives", "architecture", "keys"):
        page.goto((site / f"{name}.html").as_uri())
        page.wait_for_load_state("networkidle")
        for violation in axe.run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                nodes = [node["html"][:200] for node in violation["nodes"]]
                found.append(f"{name}: {violation['id']}: {nodes}")

    page.goto((site / "objectives.html").as_uri())
    assert page.locator("math").first.bounding_box()["height"] > 10
    page.close()
    assert not found, "\n".join(found)


def test_the_life_of_a_token_names_functions_that_are_there() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    walk = text[text.index("## The life of a token") : text.index("## Decisions")]
    steps = re.split(r"^\d+\. ", walk, flags=re.MULTILINE)[1:]
    assert len(steps) >= 9
    for step in steps:
        files = [REPOSITORY / "docs" / link for link in re.findall(r"\]\(([^)]+)\)", step)]
        source = "".join(path.read_text(encoding="utf-8") for path in files)
        for name in re.findall(r"`(_?[A-Za-z_]+)`", step):
            if name not in ("kd", "run_sft"):
                assert name in source, f"{name} is not in {[path.name for path in files]}"
