"""Every study in `examples/studies/` parses, and every run of it is one that the host takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch  # noqa: F401 - the host is imported after it, as everywhere
import yaml

from llamafactory_sekd.study.engine import open_study
from llamafactory_sekd.study.spec import read_spec


REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "examples" / "studies"
PAPER = (
    "table1",
    "table2",
    "fig2a_gamma",
    "fig2b_topk",
    "fig2c_beta",
    "fig3_progressive",
    "fig4_similarity",
    "fig5_skew_teacher",
    "gamma_auto",
)
# What several studies share, and no study by itself.
SHARED = ("paper_7b", "tiny")
STUDIES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem not in SHARED)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_parses_and_the_host_takes_each_of_its_runs(path, monkeypatch):
    from llamafactory.hparams import parser

    monkeypatch.chdir(REPOSITORY)
    study = open_study(read_spec(path.relative_to(REPOSITORY)))
    assert study.spec.effective.keys().isdisjoint({"base"})
    seen = []
    for cell in study.cells:
        config = {key: value for key, value in cell.config.items() if key not in ("output_dir", "seed")}
        if config in seen:  # another seed
            continue
        seen.append(config)
        # What an example asks of the machine, not of its reader.
        asked = {key: value for key, value in config.items() if key not in ("deepspeed", "bf16")}
        _, _, training_args, finetuning_args, _ = parser._parse_train_args(
            {**asked, "output_dir": "x", "seed": cell.seed}
        )
        assert training_args.seed == cell.seed
        assert finetuning_args.use_sekd == cell.is_distillation


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_says_its_command_and_nothing_is_written_where_another_writes(path):
    text = path.read_text(encoding="utf-8")
    assert f"#   sekd study examples/studies/{path.name}\n" in text
    own = yaml.safe_load(text)["output_dir"]
    others = [yaml.safe_load(other.read_text(encoding="utf-8"))["output_dir"] for other in STUDIES if other != path]
    assert own not in others


def test_every_figure_and_table_of_the_paper_has_a_study_and_a_tiny_one(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert {path.stem for path in STUDIES} >= {*PAPER, *(f"tiny_{name}" for name in PAPER)}
    table = open_study(read_spec(FOLDER / "table1.yaml"))
    objectives = {cell.config.get("kd_loss") for cell in table.cells}
    assert len(table.spec.systems) == 8
    assert objectives == {
        None,
        *("forward_kl", "reverse_kl", "no_evolution", "skew", "skew_teacher"),
        *("self_evolution", "self_evolution_topk"),
    }
    for name in PAPER:
        large, tiny = (open_study(read_spec(FOLDER / f"{prefix}{name}.yaml")) for prefix in ("", "tiny_"))
        if name != "table2":
            assert list(tiny.spec.systems) == list(large.spec.systems)
        assert list(tiny.spec.matrix) == list(large.spec.matrix)
        assert all(cell.config["max_steps"] <= 100 for cell in tiny.cells)
        assert len(tiny.cells) <= 16


def test_the_papers_points_are_the_papers(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    matrices = {name: dict(read_spec(FOLDER / f"{name}.yaml").matrix) for name in PAPER}
    tenths = [number / 10 for number in range(1, 11)]
    assert matrices["fig2a_gamma"] == {"kd_gamma": tenths}
    assert matrices["fig2b_topk"] == {"kd_topk": tenths[:9]}
    assert matrices["fig2c_beta"] == {"kd_beta": tenths[:9]}
    assert matrices["fig5_skew_teacher"] == {"kd_lambda": [0.3, 0.5, 0.7, 1.0]}
    teacher = read_spec(FOLDER / "fig5_skew_teacher.yaml").systems["SKEW KD (Teacher)"]
    assert teacher == {"kd_loss": "skew_teacher", "kd_beta": 0.9}
    progressive = read_spec(FOLDER / "fig3_progressive.yaml").systems["SKEW KD, 0.5→0.0"]
    assert progressive == {"kd_loss": "skew", "kd_beta_end": 1.0}


def test_the_paper_chooses_gamma_and_beta_on_its_validation_set_and_reports_k_on_its_test_set(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    evaluations = {name: open_study(read_spec(FOLDER / f"{name}.yaml")).evaluation for name in PAPER}
    tasks = {name: (evaluation["task"], evaluation["directions"]) for name, evaluation in evaluations.items()}
    validation, test = ("wmt21_valid", ["en-de", "cs-en"]), ("wmt22", ["en-de", "de-en", "en-cs", "cs-en"])
    assert tasks == {name: validation if name in ("fig2a_gamma", "fig2c_beta") else test for name in PAPER}


def test_the_papers_sft_systems_are_their_best_checkpoint_and_the_distilled_ones_their_last(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for name in PAPER:
        for study in (open_study(read_spec(FOLDER / f"{prefix}{name}.yaml")) for prefix in ("", "tiny_")):
            for cell in study.cells:
                assert cell.config.get("load_best_model_at_end", False) != cell.is_distillation, cell.id


def test_the_figures_have_the_papers_reference_systems(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    topk = open_study(read_spec(FOLDER / "fig2b_topk.yaml"))
    references = [cell.config["kd_loss"] for cell in topk.cells if not cell.axes and cell.seed == 42]
    assert references == ["forward_kl", "no_evolution", "skew", "self_evolution"]
    skew_teacher = open_study(read_spec(FOLDER / "fig5_skew_teacher.yaml"))
    assert {cell.config["kd_loss"] for cell in skew_teacher.cells} == {"forward_kl", "skew_teacher", "self_evolution"}


def test_every_teacher_of_the_papers_studies_is_made_by_a_shipped_file(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    yamls = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (FOLDER.parent / "yamls").glob("*.yaml")]
    made = {config.get("output_dir") for config in yamls}
    for name in PAPER:
        study = open_study(read_spec(FOLDER / f"{name}.yaml"))
        teachers = {cell.source["teacher_model"] for cell in study.cells if cell.is_distillation}
        assert teachers <= made
        assert {entry["model_name_or_path"] for entry in study.spec.models.values()} == teachers


def test_the_page_names_every_shipped_study_and_every_key():
    from llamafactory_sekd.study.spec import BASE, KEYS

    page = (REPOSITORY / "docs" / "study.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+)\.yaml`", page)) >= set(PAPER)
    assert set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == {BASE, *KEYS}


def test_the_example_on_the_page_is_a_study(monkeypatch, tmp_path):
    page = (REPOSITORY / "docs" / "study.md").read_text(encoding="utf-8")
    monkeypatch.chdir(REPOSITORY)
    path = tmp_path / "page.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", page, flags=re.DOTALL).group(1))
    study = open_study(read_spec(path))
    assert len(study.cells) == 27
