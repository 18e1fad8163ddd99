"""LLaMA Board in a real browser: what a user who never opens a terminal does, from the page alone."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import small_board_models, tiny
from helpers.board import CHROMIUM, Board, served

from llamafactory_sekd.host.run_progress import PHASE_FILE
from llamafactory_sekd.presets import PRESETS
from llamafactory_sekd.webui.page import LANGUAGES, alert, element_labels, words


playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need `pip install playwright`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(CHROMIUM).is_file(), reason="the browser tests need chromium (apt-get install chromium)"
    ),
]

PLOT = '[data-testid="matplotlib"]'
STAGE = "Self-Evolution KD"
RUN = "distilled"
# $SEKD_SCREENSHOTS names the folder that keeps a picture of each step (docs/images).
PICTURES = os.environ.get("SEKD_SCREENSHOTS")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the web UI runs in: a teacher that translates, a student that hardly does, their data and a test set."""
    root = tmp_path_factory.mktemp("board")
    torch.manual_seed(0)
    small_board_models.teach(tiny.save_llama(root / "teacher", seed=1, width=64, initializer_range=0.05), steps=110)
    small_board_models.teach(tiny.save_llama(root / "student", seed=2, width=48, initializer_range=0.05), steps=30)
    tiny.save_dataset(root / "data", count=56)
    (root / "wmt").mkdir()
    for column, language in enumerate(("en", "de")):
        lines = [pair[column] for pair in tiny.SENTENCES[:12]]
        (root / "wmt" / f"en-de.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright.expect.set_options(timeout=1_200_000)  # a busy machine answers late
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def board(browser: Any, address: str) -> Iterator[Board]:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(1_200_000)
    yield Board(page).open(address)
    page.close()


def picture(target: Any, name: str) -> None:
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        target.screenshot(path=Path(PICTURES) / f"webui-{name}.png")


def part(page: Any, top: Any, bottom: Any, name: str) -> None:
    """A picture of the page from one element to another, in full width."""
    if PICTURES:
        page.evaluate("document.querySelectorAll('.toast-wrap').forEach(messages => messages.remove())")
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        boxes = [
            place.evaluate("e => [e.getBoundingClientRect().top, e.getBoundingClientRect().bottom]")
            for place in (top, bottom)
        ]
        scrolled = page.evaluate("window.scrollY")
        clip = {"x": 0, "y": boxes[0][0] + scrolled - 20, "width": 1280, "height": boxes[1][1] - boxes[0][0] + 40}
        page.screenshot(path=Path(PICTURES) / f"webui-{name}.png", clip=clip, full_page=True)


def fill_in(board: Board, output_dir: str = RUN) -> None:
    """Everything a run needs, as a user fills it in."""
    board.choose("Stage", STAGE)
    board.choose("Model name", "Custom")
    board.write("Model path", "student")
    board.choose("Finetuning method", "full")
    board.choose("Chat template", "parrot")
    board.write("Teacher model", "teacher")
    board.choose_several("Dataset", "tiny")
    board.choose("Compute type", "fp32")
    board.write("Learning rate", "1e-3")
    board.write("Epochs", "6")
    board.open_section("Extra configurations")
    extra = {"use_cpu": True, "logging_steps": 1, "preprocessing_num_workers": 1, "save_only_model": True}
    board.write("Extra arguments", json.dumps(extra))
    board.write("Output dir", output_dir)


def command(board: Board) -> dict[str, str]:
    """The previewed command as keys and values."""
    board.press("Preview command")
    try:
        board.page.wait_for_function("document.body.innerText.includes('llamafactory-cli train')")
    except playwright.TimeoutError:
        pytest.fail(f"no preview; the page says: {board.page.locator('.toast-body').all_inner_texts()}")
    lines = board.page.locator("code").filter(has_text="llamafactory-cli train").inner_text().split("\\\n")
    pairs = [line.strip().removeprefix("--").split(" ", 1) for line in lines[1:]]
    return {key: value.strip() for key, value in pairs}


@pytest.fixture(scope="module")
def distilled(browser: Any, address: str, folder: Path) -> dict[str, Any]:
    """One run from the page: previewed, started, left, found again after a reload, finished."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(1_200_000)
    board = Board(page).open(address)
    fill_in(board)
    previewed = command(board)
    board.press("Start")
    # While it loads, so that there is time for the rest before the run ends.
    page.get_by_text(words("en")["phase_loading"]).filter(visible=True).first.wait_for(timeout=1_200_000)

    colleague = browser.new_page()
    colleague.goto(address)
    Board(page).open(address)  # the user reloads the page
    page.locator("#sekd_tab").wait_for()
    found_again = {label: board.field(label).input_value() for label in ("Teacher model", "Stage", "Model path")}
    for watcher in (page, colleague):
        watcher.get_by_text("Finished.", exact=True).first.wait_for(timeout=1_200_000)
    colleague.close()
    plot = page.locator(PLOT).filter(visible=True)
    plot.wait_for()
    part(page, page.get_by_role("button", name="Preview command").first, plot, "training")
    size = plot.locator("img").evaluate("image => [image.naturalWidth, image.naturalHeight]")
    page.close()
    return {
        "previewed": previewed,
        "found_again": found_again,
        "plot": size,
        "output": folder / "saves/Custom/full" / RUN,
    }


def test_the_panel_appears_for_our_stage_only_and_leaves_other_commands_alone(board: Board) -> None:
    panel = board.page.locator("#sekd_tab")
    playwright.expect(panel).to_be_hidden()
    board.choose("Stage", STAGE)
    playwright.expect(panel).to_be_visible()
    board.write("Teacher model", "teacher")
    board.choose("Stage", "KTO")
    playwright.expect(panel).to_be_hidden()
    board.choose("Model name", "Custom")
    board.write("Model path", "student")
    board.choose_several("Dataset", "tiny")
    assert not [key for key in command(board) if key.startswith(("kd_", "teacher"))]
    board.choose("Stage", STAGE)
    playwright.expect(board.field("Teacher model")).to_have_value("teacher")


def test_only_the_fields_that_the_objective_reads_are_shown_below_its_equation(board: Board) -> None:
    board.choose("Stage", STAGE)
    formula = board.page.locator("#sekd_equation .katex").first
    shown: list[str] = []
    labels = {key: element_labels()[key]["en"]["label"] for key in ("kd_beta", "kd_gamma", "kd_topk", "kd_lambda")}
    choices = {value: text for text, value in element_labels()["kd_loss"]["en"]["choices"]}
    for objective in reversed(PRESETS):  # the default last
        board.choose("Objective", choices[objective])
        for key, label in labels.items():
            expected = playwright.expect(board.block(label))
            expected.to_be_visible() if key in PRESETS[objective].keys else expected.to_have_count(0)
        playwright.expect(formula).not_to_have_text(shown[-1] if shown else "")
        shown.append(formula.text_content())
        playwright.expect(board.page.locator("#sekd_equation .katex-error")).to_have_count(0)

    assert len(set(shown)) == len(PRESETS)
    for key in ("teacher_cache", "kd_temperature", "kd_chunk_size"):
        playwright.expect(board.block(element_labels()[key]["en"]["label"])).to_have_count(0)

    picture(board.page.locator("#sekd_tab"), "panel")
    board.page.evaluate("document.body.classList.add('dark')")
    picture(board.page.locator("#sekd_tab"), "panel-dark")


def test_a_wrong_value_warns_before_anything_starts(board: Board, folder: Path) -> None:
    fill_in(board, output_dir="never")
    board.open_section("Advanced")
    toast = board.page.locator(".toast-body")
    for label, wrong, right, message in (
        ("Temperature", "-1", "1.0", "`kd_temperature: -1.0` cannot be used: use a number above 0"),
        ("Γ: difficulty threshold", "hard", "0.4", "`kd_gamma: hard` cannot be used: use a number"),
        ("Teacher model", "/no/such/teacher", "teacher", "`teacher_model: /no/such/teacher` does not exist"),
    ):
        board.write(label, wrong)
        board.press("Start")
        playwright.expect(toast.filter(has_text=message)).to_be_visible()
        board.write(label, right)

    board.write("Teacher model", "")
    board.press("Preview command")
    playwright.expect(toast.filter(has_text=alert("no_teacher_or_cache", "en"))).to_be_visible()
    board.write("Teacher cache", "no-cache")
    board.press("Preview command")
    playwright.expect(toast.filter(has_text="`teacher_cache: no-cache` holds no")).to_be_visible()
    board.page.wait_for_timeout(1000 if PICTURES else 0)  # until the message has slid in
    picture(board.page, "warning")
    board.write("Teacher server", "http://127.0.0.1:9")  # which is asked once the field is left
    playwright.expect(toast.filter(has_text="`teacher_server: http://127.0.0.1:9` cannot be reached")).to_be_visible(
        timeout=60_000
    )
    assert not (folder / "saves/Custom/full/never").exists()


def test_what_is_previewed_is_what_runs(distilled: dict[str, Any]) -> None:
    ran = yaml.safe_load((distilled["output"] / "training_args.yaml").read_text(encoding="utf-8"))
    assert {key: str(value) for key, value in ran.items()} == distilled["previewed"]
    assert ran["stage"] == "sekd"
    assert ran["teacher_model"] == "teacher"
    assert {key: ran[key] for key in ran if key.startswith("kd_")} == {
        "kd_loss": "self_evolution",
        "kd_lambda": 0.5,
        "kd_beta": 0.5,
        "kd_gamma": 0.4,
        "kd_hard_scale": "none",
        "kd_temperature": 1.0,
        "kd_max_cut": 0.5,
    }


def test_a_running_job_is_found_again_after_a_reload(distilled: dict[str, Any]) -> None:
    assert distilled["found_again"] == {"Teacher model": "teacher", "Stage": STAGE, "Model path": "student"}


def test_the_page_draws_the_loss_and_below_it_hard_share_and_difficulty(distilled: dict[str, Any]) -> None:
    lines = (distilled["output"] / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    assert {"kd/hard_ratio", "kd/difficulty"} <= set(steps[0])
    assert not (distilled["output"] / PHASE_FILE).exists()
    width, height = distilled["plot"]
    assert height > width  # the host's loss alone is drawn wider than high
    log = (distilled["output"] / "running_log.txt").read_text(encoding="utf-8")
    assert (
        log.count("'kd/difficulty'") == sum("kd/difficulty" in step for step in steps) > 0
    )  # the lines that the page shows


def test_a_saved_configuration_comes_back_after_a_reload_with_its_data_set(board: Board, address: str) -> None:
    fill_in(board, output_dir="kept")
    board.choose("Objective", "skew: " + "all tokens learn from the proxy")
    board.open_section("Advanced")
    board.write("β at the end", "1.0")
    board.write("Config path", "kept.yaml")
    before = command(board)
    board.press("Save arguments")
    board.page.get_by_text("kept.yaml").last.wait_for()

    board.open(address)
    board.write("Config path", "kept.yaml")
    board.press("Load arguments")
    playwright.expect(board.page.locator("#sekd_tab")).to_be_visible()
    board.open_section("Advanced")
    playwright.expect(board.field("β at the end")).to_have_value("1.0")
    board.write("Model path", "student")  # the host keeps neither it nor the output dir in a configuration
    board.write("Output dir", "kept")
    board.page.wait_for_timeout(1500)  # the events that follow loaded and written values
    assert command(board) == before
    assert before["kd_beta_end"] == "1.0"
    assert "kd_gamma" not in before


def test_two_pages_at_once_keep_their_own_values(board: Board, browser: Any, address: str) -> None:
    fill_in(board, output_dir="first")
    page = browser.new_page()
    page.set_default_timeout(1_200_000)
    second = Board(page).open(address)
    playwright.expect(page.locator("#sekd_tab")).to_be_hidden()
    second.choose("Model name", "Custom")
    second.write("Model path", "student")
    second.choose_several("Dataset", "tiny_valid")
    theirs = command(second)
    page.close()
    assert theirs["stage"] == "sft"
    assert not [key for key in theirs if key.startswith(("kd_", "teacher"))]
    assert command(board)["stage"] == "sekd"


def test_the_evaluation_runs_from_the_page_and_shows_its_report(
    board: Board, distilled: dict[str, Any], folder: Path
) -> None:
    fill_in(board)
    board.tab("Translation quality")
    board.write("Test set folder", "nowhere")
    board.press("Start evaluation")
    toast = board.page.locator(".toast-body").filter(has_text="task_dir nowhere is not a directory")
    playwright.expect(toast).to_be_visible()

    board.write("Test set folder", "wmt")
    board.choose_several("Directions", "en-de")
    board.choose_several("Checkpoints", RUN)
    board.page.get_by_label("Include the teacher").check()
    board.choose("Baseline", "base")
    board.choose_several("Metrics", "bleu", "chrf")
    board.write("Results folder", "results/tiny")
    board.press("Start evaluation")
    report = board.page.locator("#quality_report")
    report.get_by_role("heading", name="Evaluation on wmt22").wait_for(timeout=1_200_000)
    assert report.locator("table").first.locator("tbody tr").count() == 3
    plot = board.page.locator(PLOT).filter(visible=True)
    playwright.expect(plot).to_be_visible()
    files = board.block_of_files("Files")
    for name in ("report.html", "results.json", "tiny.yaml", "tiny.log"):
        playwright.expect(files.locator(f"a[href$='{name}']").first).to_be_attached()
    part(board.page, board.block("Test set"), report.locator("table").nth(1), "quality")

    results = json.loads((folder / "results/tiny/results.json").read_text(encoding="utf-8"))
    assert set(results["systems"]) == {"base", RUN, "teacher"}
    assert results["systems"][RUN]["scores"]["en-de"]["bleu"] > results["systems"]["base"]["scores"]["en-de"]["bleu"]


def test_the_page_s_checkpoint_is_the_one_to_evaluate_and_the_folder_follows_the_test_set(
    board: Board, distilled: dict[str, Any]
) -> None:
    fill_in(board)
    board.choose("Checkpoint path", RUN)
    board.tab("Translation quality")
    playwright.expect(board.block("Checkpoints")).to_contain_text(RUN)
    playwright.expect(board.field("Results folder")).to_have_value("results/wmt22")
    board.write("Test set", "flores 200")
    playwright.expect(board.field("Results folder")).to_have_value("results/flores-200")
    board.write("Results folder", "results/mine")
    board.write("Test set", "wmt21")
    board.page.wait_for_timeout(1500)
    playwright.expect(board.field("Results folder")).to_have_value("results/mine")


@pytest.mark.parametrize("width", [1280, 1920])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_our_parts_have_no_serious_accessibility_finding(browser: Any, address: str, theme: str, width: int) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python"
    ).Axe()
    page = browser.new_page(viewport={"width": width, "height": 1000})
    page.set_default_timeout(1_200_000)
    board = Board(page).open(address, theme)
    board.choose("Stage", STAGE)
    board.open_section("Advanced")
    found = []
    for tab, place in (
        ("Train", "#sekd_tab"),
        ("Translation quality", "#quality_tab"),
        ("Token difficulty", "#compare_tab"),
    ):
        board.tab(tab)
        page.locator(place).wait_for()
        page.wait_for_timeout(500)
        for violation in axe.run(page, context={"include": [[place]]}).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                nodes = [node["html"][:300] for node in violation["nodes"]]
                found.append(f"{tab}: {violation['id']}: {violation['help']}: {nodes}")
        overflow = page.locator(place).evaluate("part => part.scrollWidth - part.clientWidth")
        assert overflow <= 1, f"{tab} is wider than the page"
        ends = page.locator(f"{place} .max_value").filter(visible=True)
        inside = "end => end.getBoundingClientRect().right <= end.closest('.block').getBoundingClientRect().right"
        assert all(ends.nth(number).evaluate(inside) for number in range(ends.count())), f"{tab}: a slider is cut"
        picture(page, f"check-{place[1:]}-{theme}-{width}")

    board.tab("Train")
    assert board.field("Stage").evaluate("field => field.scrollWidth <= field.clientWidth"), "the stage's name is cut"
    page.close()
    assert not found, "\n".join(found)


def test_checkpoints_of_the_page_are_suggested_as_teachers(board: Board, distilled: dict[str, Any]) -> None:
    board.choose("Stage", STAGE)
    board.choose("Teacher model", f"saves/Custom/full/{RUN}")
    playwright.expect(board.field("Teacher model")).to_have_value(f"saves/Custom/full/{RUN}")


def test_the_tokens_of_a_sentence_are_easier_after_the_distillation(board: Board, distilled: dict[str, Any]) -> None:
    fill_in(board)
    board.tab("Token difficulty")
    board.press("Compare")
    playwright.expect(board.page.locator(".toast-body").filter(has_text=alert("no_checkpoint", "en"))).to_be_visible()

    board.choose("Checkpoint path", RUN)
    board.write("Test set folder", "wmt")
    board.write("Sentence number", "3")
    board.press("Use this sentence")
    playwright.expect(board.field("Reference translation")).to_have_value(tiny.SENTENCES[2][1])
    board.press("Compare")
    columns = board.page.locator(".sekd-column")
    columns.first.wait_for(timeout=1_200_000)
    summaries = [columns.nth(place).inner_text() for place in range(3)]
    before, after, _ = (float(re.search(r"mean difficulty ([\d.]+)", text)[1]) for text in summaries)
    assert after < before
    assert "kd_gamma 0.4" in board.page.locator("#compare_view").inner_text()
    assert "kd_max_cut" not in board.page.locator("#compare_view").inner_text()
    tokens = columns.first.locator(".sekd-token")
    assert re.sub(r"\s", "", columns.first.locator(".sekd-tokens").inner_text()).startswith("Haus")
    assert tokens.count() == columns.nth(1).locator(".sekd-token").count()
    hard = tokens.evaluate_all("all => all.map(one => [one.title.split(' ')[0], one.classList.contains('sekd-hard')])")
    assert {word == words("en")["hard"] for word, marked in hard if marked} == {True}
    board.page.wait_for_timeout(5000 if PICTURES else 0)  # until the warnings have gone
    picture(board.page.locator("#compare_view"), "tokens")
    board.page.evaluate("document.body.classList.add('dark')")
    picture(board.page.locator("#compare_view"), "tokens-dark")


def test_every_language_of_the_host_labels_our_parts(board: Board) -> None:
    board.choose("Stage", STAGE)
    language_field = "Language"
    names = {"en": "Language", "ru": "Язык", "zh": "语言", "ko": "언어", "ja": "言語"}
    for language in [*LANGUAGES[1:], "en"]:
        board.choose(language_field, language)
        language_field = names[language]
        labels = element_labels()
        playwright.expect(board.block(labels["teacher_model"][language]["label"])).to_be_visible()
        text = board.page.locator("#sekd_tab").inner_text()
        for key in ("sekd_tab", "sekd_advanced", "kd_lambda", "kd_gamma"):
            assert labels[key][language]["label"] in text
        playwright.expect(board.page.get_by_role("tab", name=labels["compare_tab"][language]["label"])).to_be_visible()
        if language == "zh":
            picture(board.page.locator("#sekd_tab"), "panel-zh")


def test_an_evaluation_can_be_stopped(board: Board, folder: Path, distilled: dict[str, Any]) -> None:
    fill_in(board)
    board.tab("Translation quality")
    board.write("Test set folder", "wmt")
    board.choose_several("Directions", "en-de")
    board.choose_several("Metrics", "bleu")
    board.write("Results folder", "results/stopped")
    board.press("Start evaluation")
    deadline = time.monotonic() + 1200
    while not (folder / "results/stopped.log").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    board.press("Stop evaluation")
    board.page.locator(".toast-body").filter(has_text="Ready.").wait_for()
    assert not (folder / "results/stopped/results.json").exists()
