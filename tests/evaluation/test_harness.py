"""EleutherAI's harness asks the host's models; its figures are those of the harness alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.sentences import ENGLISH

from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.evaluation_settings import System
from llamafactory_sekd.evaluation.harness import (
    Harness,
    build_harness_document,
    evaluate_by_harness,
    parse_harness,
    scores_of,
)
from llamafactory_sekd.host.evaluate import evaluate_on_tasks, run_eval
from llamafactory_sekd.reporting.document import render_markdown


TASK = {
    "task": "rivers",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}
FOUND = {
    "results": {
        "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "b": {"ppl,none": 9.0, "ppl_stderr,none": "N/A"},
    },
    "versions": {"a": 1, "b": 2},
    "n-samples": {"a": {"effective": 6}, "b": {"effective": 4}},
    "higher_is_better": {"a": {"acc": True}, "b": {"ppl": False}},
    "group_subtasks": {},
}


@pytest.fixture
def keys(config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    systems = {name: config["systems"][name] for name in ("one", "two")}
    return {"task": "lm_eval:a,b", "systems": systems, "baseline": "one", "save_dir": str(tmp_path / "harness")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directions": ["en-de"]}, "`directions` has no effect on `task: lm_eval:a,b`"),
        ({"num_fewshots": 3}, "did you mean 'num_fewshot'"),
        ({"task": "lm_eval:a,"}, "`task` must name tasks of the harness"),
        ({"num_fewshot": -1}, "`num_fewshot` must be an integer of at least 0, not -1."),
        ({"apply_chat_template": "yes"}, "`apply_chat_template` must be true or false, not 'yes'."),
        ({"systems": {"h": {"hypotheses": "x"}}, "baseline": None}, "the harness evaluates models, not `hypotheses`"),
        ({"baseline": "three"}, "`baseline` is 'three', which is not among the systems"),
    ],
)
def test_keys_that_cannot_work_are_named(changes: dict[str, Any], message: str, keys: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError) as caught:
        parse_harness({**keys, **changes}, "eval.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scores_keep_their_errors_and_which_way_is_better() -> None:
    found = scores_of(FOUND, ["a", "b"])
    assert found["scores"] == {
        "a": {"acc,none": {"value": 0.5, "stderr": 0.1}},
        "b": {"ppl,none": {"value": 9.0, "stderr": None}},
    }
    assert found["tasks"]["b"] == {"version": 2, "samples": 4, "metrics": {"ppl,none": False}}


def test_what_is_finished_is_not_run_again_and_the_report_shows_differences(
    keys: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[str] = []

    def run(system: System) -> dict[str, Any]:
        runs.append(system.name)
        if runs == ["one", "two"]:
            raise EvaluationError("killed")
        return scores_of(FOUND, ["a", "b"])

    harness = Harness(frozenset("ab"), run, lambda system: system.name, {"lm_eval": "0"})
    asked = parse_harness(keys, "eval.yaml")
    with pytest.raises(EvaluationError, match="killed"):
        evaluate_by_harness(asked, harness)
    results = evaluate_by_harness(asked, harness)
    assert runs == ["one", "two", "two"]
    text = render_markdown(build_harness_document(results))
    assert "0.5000** ± 0.1000 (+0.0000)" in text
    assert "ppl ↓" in text
    assert "6 examples, version 1" in text
    assert json.loads((asked.settings.save_dir / "results.json").read_text()) == results
    assert "Report:" in capsys.readouterr().out
    with pytest.raises(EvaluationError, match="`task`: the harness has no task 'c'"):
        evaluate_by_harness(parse_harness({**keys, "task": "lm_eval:c"}, "eval.yaml"), harness)


def test_without_the_harness_the_extra_is_named(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(EvaluationError, match=r"pip install 'llamafactory-sekd\[lm-eval\]'"):
        evaluate_on_tasks(parse_harness(keys, "eval.yaml"))


@pytest.mark.parametrize("variable", [("FORCE_TORCHRUN", "1"), ("WORLD_SIZE", "2")], ids=lambda pair: pair[0])
def test_several_ranks_are_refused_by_name(
    variable: tuple[str, str],
    keys: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(*variable)
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(keys))
    with pytest.raises(SystemExit) as ended:
        run_eval([str(tmp_path / "eval.yaml")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llamafactory-cli eval: error: `task: lm_eval:a,b` runs in one process")
    assert "unset FORCE_TORCHRUN" in line


def test_a_local_task_runs_offline_and_scores_as_the_harness_alone(
    keys: dict[str, Any], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = [
        {"question": text, "choices": [f" wort{3 * place}", f" wort{5 * place + 1}"], "answer": place % 2}
        for place, text in enumerate(ENGLISH)
    ]
    (folder / "rivers.json").write_text(json.dumps(questions))
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "rivers.json")}}}
    (folder / "rivers.yaml").write_text(yaml.safe_dump({**TASK, **data}))

    keys |= {"task": "lm_eval:rivers", "task_dir": str(folder)}
    results = evaluate_on_tasks(parse_harness(keys, "eval.yaml"))

    for name, model in models.items():
        alone = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={model},dtype=float32",
            device="cpu",
            tasks=["rivers"],
            task_manager=TaskManager(include_path=str(folder)),
            log_samples=False,
        )
        expected = alone["results"]["rivers"]
        found = results["systems"][name]["scores"]["rivers"]["acc,none"]
        assert found == {"value": expected["acc,none"], "stderr": pytest.approx(expected["acc_stderr,none"])}
    assert results["tasks"]["rivers"]["samples"] == len(ENGLISH)
    assert "lm_eval" in results["versions"]
