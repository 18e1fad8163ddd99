"""`llamafactory-cli eval`, the real command: from two models to a report, killed, continued, on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.forks import Fork, forked
from helpers.sentences import ENGLISH, write_lines

from llamafactory_sekd.host.evaluate import run_eval


Write = Callable[[dict[str, Any]], Path]


def command(*arguments: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    cli = Path(sys.executable).with_name("llamafactory-cli")
    return [str(cli), "eval", *arguments], {**os.environ, "OMP_NUM_THREADS": "1", **environment}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words, variables = command(*arguments, **environment)
    return subprocess.run(words, env=variables, capture_output=True, text=True, check=False, timeout=1800)


def hypotheses(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted((folder / "hypotheses").rglob("*.txt"))
    }


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command in this process, see it fail as a user's error does, and return what it said."""
    with pytest.raises(SystemExit) as caught:
        run_eval(list(arguments))
    assert caught.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llamafactory-cli eval: error: ")]
    assert len(said) == 1
    return said[0].removeprefix("llamafactory-cli eval: error: ")


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], task_dir: Path, human: Path
) -> tuple[Path, str]:
    """The report of one complete run through the command (and what it printed), for several tests to look at."""
    folder = tmp_path_factory.mktemp("finished")
    keys = {
        "task": "wmt22",
        "task_dir": str(task_dir),
        "directions": ["en-de", "de-en"],
        "systems": {
            "one": {"model_name_or_path": str(models["one"])},
            "two": {"model_name_or_path": str(models["two"])},
            "human": {"hypotheses": str(human)},
        },
        "baseline": "one",
        "teacher": "two",
        "metrics": ["bleu", "chrf"],
        "max_new_tokens": 48,
        "save_dir": str(folder / "results"),
    }
    path = folder / "eval.yaml"
    path.write_text(json.dumps(keys))
    done = run(str(path))
    assert done.returncode == 0, done.stderr
    return folder / "results", done.stdout


def test_one_command_gives_translations_scores_and_report(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    results = json.loads((folder / "results.json").read_text())
    assert set(results["systems"]) == {"one", "two", "human"}
    assert results["systems"]["human"]["scores"]["average"]["bleu"] > 50
    assert results["systems"]["one"]["generation"]["en-de"]["sentences_per_second"] > 0
    assert results["systems"]["human"]["generation"] == {}
    assert results["significance"]["human"]["en-de"]["bleu"]["p"] < 0.05
    assert len(hypotheses(folder)) == 6
    assert all(text.count("\n") == len(ENGLISH) for text in hypotheses(folder).values())
    assert (folder / "report.html").is_file()
    assert (folder / "report.md").is_file()
    assert "chrF2, wmt22" in printed
    assert "human" in printed


def test_the_two_directions_and_the_two_models_translate_differently(finished: tuple[Path, str]) -> None:
    """Else the comparisons below would compare little."""
    texts = hypotheses(finished[0])
    assert len(set(texts.values())) == len(texts)


def test_a_killed_run_continues_to_the_same_result(
    finished: tuple[Path, str], config: dict[str, Any], write_config: Write
) -> None:
    process = Fork(command(str(write_config({**config, "batch_size": 1})))[0])
    partial = Path(config["save_dir"]) / "hypotheses" / "one" / ".en-de.partial.0.jsonl"
    deadline = time.monotonic() + 1200
    while time.monotonic() < deadline and not (partial.is_file() and partial.read_bytes().count(b"\n") > 3):
        time.sleep(0.002)
    process.kill()
    process.wait()
    kept = partial.read_bytes().count(b"\n") - 1
    assert 3 <= kept < len(ENGLISH), "killed too early or too late to show anything"
    assert not (Path(config["save_dir"]) / "results.json").exists()

    continued = forked(command(str(write_config(config)))[0])
    assert continued.returncode == 0, continued.stderr
    assert f"one en-de: continuing, {kept} of {len(ENGLISH)} are done." in continued.stderr
    assert hypotheses(Path(config["save_dir"])) == hypotheses(finished[0])
    results = json.loads((Path(config["save_dir"]) / "results.json").read_text())
    expected = json.loads((finished[0] / "results.json").read_text())
    for key in ("significance", "signatures", "fingerprints", "versions", "test_sets"):
        assert results[key] == expected[key]
    assert not list(Path(config["save_dir"]).rglob("*.jsonl"))


def test_two_ranks_give_what_one_gives_and_the_first_scores_comet(
    finished: tuple[Path, str], config: dict[str, Any], write_config: Write, tmp_path: Path
) -> None:
    pytest.importorskip("comet", reason="unbabel-comet is not installed (the extra [comet])")
    from helpers.tiny_comet import save_comet

    checkpoint = save_comet(tmp_path / "comet", ENGLISH)
    config |= {"metrics": ["bleu", "comet", "metricx?"], "comet_model": str(checkpoint), "metricx": "nobody/none"}
    ranks = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    done = run(str(write_config(config)), "batch_size=2", HF_HUB_OFFLINE="1", **ranks)
    assert done.returncode == 0, done.stderr
    # Whatever is skipped is named once, not by the launcher, the ranks and the table.
    assert [text.count("MetricX is skipped: ") for text in (done.stderr, done.stdout)] == [1, 0]
    assert "was skipped" not in done.stdout
    assert "MetricX was skipped: " in (Path(config["save_dir"]) / "report.md").read_text()
    assert "rank 1 of 2" in done.stderr
    folder = Path(config["save_dir"])
    assert hypotheses(folder) == hypotheses(finished[0])
    assert json.loads((folder / "hypotheses" / "one" / "en-de.meta.json").read_text())["ranks"] == 2
    assert done.stdout.count("BLEU, wmt22") == 1
    results = json.loads((folder / "results.json").read_text())
    assert results["systems"]["human"]["scores"]["en-de"]["comet"] is not None
    assert set(results["significance"]["human"]["en-de"]["comet"]) >= {"p", "t", "mean", "wins", "losses", "ties"}
    assert results["signatures"]["en-de"]["comet"].startswith(f"model:{checkpoint}")


def test_an_error_under_torchrun_is_said_once(
    config: dict[str, Any], write_config: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    config["systems"]["one"]["model_name_or_path"] = "saves/not/there"
    message = error(capsys, str(write_config(config)))
    assert message == "`systems.one`: the directory saves/not/there does not exist."


def test_what_is_finished_is_used_again_until_the_model_changes(
    config: dict[str, Any],
    write_config: Write,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers import AutoModelForCausalLM

    moved = tmp_path / "moved"
    moved.mkdir()
    for file in models["one"].iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    config["systems"] = {"one": {"model_name_or_path": str(models["one"])}}
    config |= {"directions": ["en-de"], "baseline": None, "teacher": None}
    path = write_config(config)
    run_eval([str(path)])
    first = hypotheses(Path(config["save_dir"]))
    assert "translated before" not in caplog.text

    run_eval([str(path), f"systems.one.model_name_or_path={moved}", "batch_size=3"])
    assert "one en-de: already translated and unchanged; skipping." in caplog.text
    assert "all params" not in capsys.readouterr().out.split("Report:")[-1]

    model = AutoModelForCausalLM.from_pretrained(moved, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[-50:] = model.lm_head.weight[-50:].flip(0)
    model.save_pretrained(moved)
    run_eval([str(path), f"systems.one.model_name_or_path={moved}"])
    assert "one en-de: the model or its environment changed; translating again." in caplog.text
    assert hypotheses(Path(config["save_dir"])) != first


def test_an_adapter_is_loaded_and_counts(
    config: dict[str, Any], models: dict[str, Path], write_config: Write, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(models["one"], dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["gate_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    system = {"model_name_or_path": str(models["one"])}
    config["systems"] = {"plain": system, "lora": {**system, "adapter_name_or_path": str(tmp_path / "adapter")}}
    config |= {"directions": ["en-de"], "baseline": "plain", "teacher": None}
    run_eval([str(write_config(config))])
    folder = Path(config["save_dir"])
    texts = hypotheses(folder)
    assert texts["hypotheses/plain/en-de.txt"] != texts["hypotheses/lora/en-de.txt"]
    fingerprints = json.loads((folder / "results.json").read_text())["fingerprints"]
    assert fingerprints["plain"] != fingerprints["lora"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "wmt99", "task_dir": "{one}"}, "Unknown task 'wmt99'"),
        ({"directions": ["en-fr"]}, "No wmt22 test set for en-fr in"),
        ({"template": "parot"}, "`template`: LLaMA-Factory has no template 'parot': did you mean 'parrot'?"),
        (
            {"systems": {"one": {"model_name_or_path": "{one}", "infer_dtyp": "auto"}}},
            "`systems.one`: unknown key 'infer_dtyp'",
        ),
        ({"systems": {"one": {"model_name_or_path": "{task_dir}"}}}, "has no config.json, so it holds no model."),
        ({"systems": {"one": {"hypotheses": "{task_dir}"}}}, "/en-de.txt do not exist: one translation per line"),
        ({"backend": "vllm"}, "`backend: vllm` needs vLLM"),
        ({"metrics": ["comet"], "comet_model": "no/such.ckpt"}, "`comet_model`: no/such.ckpt does not exist."),
        ({"save_dir": "{task_dir}"}, "holds something other than an evaluation: use another one."),
        ({"save_dir": "{task_dir}/en-de.en"}, "is a file, not a directory."),
    ],
)
def test_bad_input_is_named_in_one_line_before_anything_is_written(
    changes: dict[str, Any],
    message: str,
    config: dict[str, Any],
    write_config: Write,
    capsys: pytest.CaptureFixture[str],
    models: dict[str, Path],
    task_dir: Path,
) -> None:
    filled = json.loads(json.dumps(changes).replace("{one}", str(models["one"])).replace("{task_dir}", str(task_dir)))
    config = {**config, "baseline": None, "teacher": None, **filled}
    if message.startswith("`backend: vllm`"):
        try:
            import vllm  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("vLLM is installed")
    assert message in error(capsys, str(write_config(config)))
    assert not Path(config["save_dir"]).joinpath("evaluation.json").exists()


def test_hypotheses_with_a_line_missing_are_named(
    config: dict[str, Any], write_config: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "short" / "en-de.txt", ["nur eine"])
    config["systems"]["human"] = {"hypotheses": str(file.parent)}
    message = error(capsys, str(write_config(config)))
    assert message == f"The hypotheses {file} have 1 lines, but the test set has {len(ENGLISH)}."


def test_an_empty_test_set_is_named(
    config: dict[str, Any], write_config: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for language in ("en", "de"):
        write_lines(tmp_path / "empty" / f"en-de.{language}", [])
    config |= {"task_dir": str(tmp_path / "empty"), "directions": ["en-de"]}
    assert "empty" in error(capsys, str(write_config(config)))


def test_a_save_dir_of_another_configuration_is_refused(
    finished: tuple[Path, str], config: dict[str, Any], write_config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hypotheses(finished[0])
    config |= {"save_dir": str(finished[0]), "num_beams": 4}
    message = error(capsys, str(write_config(config)))
    assert message.endswith("holds an evaluation with `num_beams` 1, and this one has 4: use another `save_dir`.")
    assert hypotheses(finished[0]) == before


def test_a_second_run_in_the_same_save_dir_is_refused(
    finished: tuple[Path, str], config: dict[str, Any], write_config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    config["save_dir"] = str(finished[0])
    with open(finished[0] / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "Another evaluation is running" in error(capsys, str(write_config(config)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "missing.yaml cannot be read: No such file or directory."),
        (["eval.txt"], "eval.txt is not a YAML file."),
        (["{config}", "num_beams"], "'num_beams' is not an override: write key=value."),
        (["{config}", "num_beams=many"], "`num_beams` must be an integer of at least 1, not 'many'."),
        (["{config}", "systems.one.hypotheses=x"], "`systems.one` needs either `model_name_or_path` or `hypotheses`."),
        (
            ["{config}", "systems.one.infer_dtyp=bfloat16"],
            "`systems.one`: unknown key 'infer_dtyp': did you mean 'infer_dtype'?",
        ),
        (["{broken}"], "cannot be parsed: "),
        (["{list}"], "must hold keys and values."),
    ],
)
def test_a_command_line_that_cannot_be_read_is_named(
    arguments: list[str],
    message: str,
    config: dict[str, Any],
    write_config: Write,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "broken.yaml").write_text("task: [\n")
    (tmp_path / "list.yaml").write_text("- task\n")
    files = {"{config}": write_config(config), "{broken}": tmp_path / "broken.yaml", "{list}": tmp_path / "list.yaml"}
    assert message in error(capsys, *(str(files.get(argument, argument)) for argument in arguments))


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_eval(["--help"])
    assert caught.value.code == 0
    assert "llamafactory-cli eval CONFIG.yaml" in capsys.readouterr().out
