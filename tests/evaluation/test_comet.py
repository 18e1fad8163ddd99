"""COMET through the real library, with a checkpoint small enough to build here."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.sentences import ENGLISH, GERMAN, write_lines

from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.metric_models import prepare_comet
from llamafactory_sekd.evaluation.scores import Texts
from llamafactory_sekd.evaluation.significance import comet_paired
from llamafactory_sekd.fingerprints import Digests


WORSE = [line[: len(line) // 2] for line in GERMAN]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("comet", reason="unbabel-comet is not installed (the extra [comet])")
    from helpers.tiny_comet import save_comet

    return save_comet(tmp_path_factory.mktemp("comet"), ENGLISH + GERMAN)


def predict(checkpoint: Path, hypotheses: Sequence[str]) -> list[float]:
    """Score with the library alone, one sentence at a time."""
    from comet import load_from_checkpoint

    model = load_from_checkpoint(str(checkpoint)).eval()
    rows = zip(ENGLISH, hypotheses, GERMAN, strict=True)
    samples = [{"src": source, "mt": hypothesis, "ref": reference} for source, hypothesis, reference in rows]
    return model.predict(samples, batch_size=1, gpus=0, accelerator="cpu", progress_bar=False).scores


def test_segment_scores_are_those_of_the_library(checkpoint: Path, tmp_path: Path) -> None:
    scorer = prepare_comet(str(checkpoint.parents[1]), Digests())
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    scores = scorer.score({good: Texts(ENGLISH, GERMAN, GERMAN), bad: Texts(ENGLISH, WORSE, GERMAN)})
    assert scores[good] == pytest.approx(predict(checkpoint, GERMAN), abs=1e-5)
    assert scores[bad] == pytest.approx(predict(checkpoint, WORSE), abs=1e-5)
    assert max(abs(a - b) for a, b in zip(scores[good], scores[bad], strict=True)) > 1e-3
    assert "class:RegressionMetric" in scorer.signature


@pytest.mark.parametrize(
    ("kind", "needs", "reads"),
    [("kiwi", False, False), ("referenceless_regression_metric", False, False), ("unified_metric", False, True)],
)
def test_the_kind_of_a_model_is_found_out_and_its_scores_are_the_librarys(
    kind: str, needs: bool, reads: bool, tmp_path: Path
) -> None:
    pytest.importorskip("comet", reason="unbabel-comet is not installed (the extra [comet])")
    from comet import load_from_checkpoint
    from helpers.tiny_comet import save_comet

    checkpoint = save_comet(tmp_path / kind, ENGLISH + GERMAN, kind)
    library = load_from_checkpoint(str(checkpoint)).eval()
    pairs = [{"src": source, "mt": hypothesis} for source, hypothesis in zip(ENGLISH, WORSE, strict=True)]
    with_references = [{**pair, "ref": reference} for pair, reference in zip(pairs, GERMAN, strict=True)]
    keys = {"batch_size": 1, "gpus": 0, "accelerator": "cpu", "progress_bar": False}
    without, with_them = (library.predict(samples, **keys).scores for samples in (pairs, with_references))

    scorer = prepare_comet(str(checkpoint), Digests(), has_references=True)
    assert scorer.needs_references == needs
    assert f"references:{'yes' if reads else 'no'}|precision:float32|" in scorer.signature
    found = scorer.score({tmp_path / "a.json": Texts(ENGLISH, WORSE, GERMAN)})[tmp_path / "a.json"]
    assert found == pytest.approx(with_them if reads else without, abs=1e-5)
    alone = prepare_comet(str(checkpoint), Digests(), has_references=False)
    found = alone.score({tmp_path / "b.json": Texts(ENGLISH, WORSE, None)})[tmp_path / "b.json"]
    assert found == pytest.approx(without, abs=1e-5)
    if reads:
        assert without != pytest.approx(with_them, abs=1e-4)


def test_scores_that_are_known_are_not_computed_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = prepare_comet(str(checkpoint), Digests())
    place = tmp_path / "en-de.comet.json"
    first = scorer.score({place: Texts(ENGLISH, GERMAN, GERMAN)})

    def refuse(*_: Any) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr("llamafactory_sekd.evaluation.metric_models._load_comet", refuse)
    assert scorer.score({place: Texts(ENGLISH, GERMAN, GERMAN)}) == first
    with pytest.raises(AssertionError, match="loaded again"):
        scorer.score({place: Texts(ENGLISH, WORSE, GERMAN)})


def test_the_comparison_is_that_of_comet_compare(checkpoint: Path, tmp_path: Path) -> None:
    """The command computes in half precision, so its own segment scores go into our comparison."""
    files = {"src": ENGLISH, "ref": GERMAN, "x": [*GERMAN[:6], *WORSE[6:]], "y": WORSE}
    paths = {name: str(write_lines(tmp_path / name, lines)) for name, lines in files.items()}
    report = tmp_path / "report.json"
    command = "from comet.cli.compare import compare_command; compare_command()"
    options = ["-s", paths["src"], "-r", paths["ref"], "-t", paths["x"], paths["y"], "--gpus", "0"]
    subprocess.run(
        [sys.executable, "-c", command, *options, "--model", str(checkpoint), "--to_json", str(report)],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    content = json.loads(report.read_text())
    (theirs,) = content["statistical_results"]
    system, baseline = (entry["scores"] for entry in content["translations"])
    ours = comet_paired(system, baseline)
    bootstrap, t_test = theirs["bootstrap_resampling"], theirs["paired_t-test"]
    assert ours.p == pytest.approx(t_test["p_value"])
    assert ours.t == pytest.approx(t_test["statistic"])
    assert ours.mean == pytest.approx(bootstrap["x-mean"])
    assert ours.baseline_mean == pytest.approx(bootstrap["y-mean"])
    assert ours.wins == pytest.approx(bootstrap["x_wins (%)"])
    assert ours.losses == pytest.approx(bootstrap["y_wins (%)"])
    assert ours.ties == pytest.approx(bootstrap["ties (%)"])
    assert ours.wins + ours.losses + ours.ties == pytest.approx(1)
    assert 0 < ours.losses < 1


def test_systems_with_the_same_scores_tie() -> None:
    scores = np.linspace(0, 1, 50).tolist()
    paired = comet_paired(scores, scores)
    assert paired.ties == 1
    assert np.isnan(paired.p)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/model.ckpt", "`comet_model`: missing/model.ckpt does not exist."),
        ("{tmp}", "has no checkpoints/model.ckpt."),
        ("{tmp}/broken.ckpt", "cannot be loaded"),
    ],
)
def test_a_checkpoint_that_cannot_be_had_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "broken.ckpt").write_text("no checkpoint")
    with pytest.raises(EvaluationError) as caught:
        prepare_comet(name.format(tmp=tmp_path), Digests())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EvaluationError, match="`comet_model`: nobody/no-such-comet cannot be downloaded") as caught:
        prepare_comet("nobody/no-such-comet", Digests())
    assert str(caught.value).endswith("cannot be downloaded (no network); docs/troubleshooting.md has the remedy.")
    assert "`comet?`" not in str(caught.value)  # an evaluation adds it where `comet` was written


OFFLINE = """
import sys
from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.metric_models import prepare_comet
from llamafactory_sekd.fingerprints import Digests
try:
    print(prepare_comet(sys.argv[1], Digests()).signature)
except EvaluationError as error:
    print(error)
"""


def prepared_offline(checkpoint: Path, home: Path) -> str:
    """Prepare a checkpoint in a process whose hub cache is `home` and whose network leads nowhere."""
    environment = {**os.environ, "HF_HOME": str(home), "HTTPS_PROXY": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", OFFLINE, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=20 * 60)
    return done.stdout.strip().splitlines()[-1]


def test_an_encoder_that_is_not_there_is_named_with_a_remedy_that_works(checkpoint: Path, tmp_path: Path) -> None:
    import torch

    own = tmp_path / "comet"
    shutil.copytree(checkpoint.parents[1], own)
    hparams = yaml.safe_load((own / "hparams.yaml").read_text())
    encoder = Path(hparams["pretrained_model"])
    (own / "hparams.yaml").write_text(yaml.safe_dump({**hparams, "pretrained_model": "nobody/encoder"}))
    content = torch.load(own / "checkpoints" / "model.ckpt", weights_only=False)
    content["hyper_parameters"]["pretrained_model"] = "nobody/encoder"
    torch.save(content, own / "checkpoints" / "model.ckpt")

    said = prepared_offline(own, tmp_path / "home")
    assert said.endswith(
        "needs configuration and tokenizer of its encoder nobody/encoder, which cannot be downloaded (no network); "
        "docs/troubleshooting.md has the remedy."
    )
    page = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert "hf download xlm-roberta-large config.json tokenizer.json" in page

    # What that command leaves behind.
    snapshot = tmp_path / "home" / "hub" / "models--nobody--encoder" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(encoder / name, snapshot / name)
    said = prepared_offline(own, tmp_path / "home")
    assert "class:RegressionMetric" in said


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_comet(name: str, *arguments: Any, **keys: Any) -> Any:
        if name == "comet":
            raise ImportError("No module named 'comet'")
        return real_import(name, *arguments, **keys)

    monkeypatch.setattr(builtins, "__import__", without_comet)
    with pytest.raises(EvaluationError, match=r"pip install 'llamafactory-sekd\[comet\]'"):
        prepare_comet("Unbabel/wmt22-comet-da", Digests())
