"""`sekd translate`: text in, text out; nothing shifts, nothing is lost, and parts make the same as one run."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.forks import Fork, forked
from helpers.sentences import ENGLISH, GERMAN

from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.data.prompts import PARROT


Run = Callable[..., None]
LANGUAGES = ("--from", "en", "--to", "de")


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(path)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write(tmp_path / "in.txt", "".join(f"{line}\n" for line in ENGLISH))


def command(model: Path, *words: object) -> list[str]:
    return [
        str(Path(sys.executable).with_name("sekd")),
        "translate",
        "--model",
        str(model),
        *LANGUAGES,
        "--max-new-tokens",
        "48",
        *map(str, words),
    ]


def test_stdin_to_stdout_keeps_every_line_in_its_place(model: Path, text: Path, sekd_translate: Run) -> None:
    """Empty lines, bytes that are no text and control characters are empty lines of the output."""
    sekd_translate(*LANGUAGES, "--in", text, "--out", text.with_name("clean.txt"))
    clean = lines(text.with_name("clean.txt"))
    mixed = [*ENGLISH[:3], "", "\x00", *ENGLISH[3:6], "\ufeff", *ENGLISH[6:]]
    data = "\r\n".join(mixed).encode().replace("\ufeff".encode(), b"\xff\xfe bytes")
    done = forked(command(model), stdin=data)
    assert done.returncode == 0, done.stderr
    expected = [*clean[:3], "", "", *clean[3:6], "", *clean[6:]]
    assert done.stdout.split("\n") == [*expected, ""]
    assert "1 times: not valid UTF-8" in done.stderr


def test_greedy_translations_are_those_of_the_evaluation(
    model: Path, text: Path, sekd_translate: Run, tmp_path: Path
) -> None:
    import yaml

    from llamafactory_sekd.host.evaluate import run_eval

    for side, sentences in (("en", ENGLISH), ("de", GERMAN)):
        write(tmp_path / f"en-de.{side}", "".join(f"{line}\n" for line in sentences))
    keys = {
        "task": "wmt22",
        "task_dir": str(tmp_path),
        "directions": ["en-de"],
        "metrics": ["chrf"],
        "systems": {"one": {"model_name_or_path": str(model)}},
        "save_dir": str(tmp_path / "eval"),
        "max_new_tokens": 48,
    }
    run_eval([str(write(tmp_path / "eval.yaml", yaml.safe_dump(keys)))])
    sekd_translate(*LANGUAGES, "--in", text, "--out", tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == (tmp_path / "eval" / "hypotheses" / "one" / "en-de.txt").read_text()


def test_a_killed_run_continues_to_the_same_samples(
    model: Path, text: Path, sekd_translate: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ("--method", "sample", "--n-best", 3, "--in", text, "--batch-size", 1)
    sekd_translate(*LANGUAGES, *keys, "--out", tmp_path / "once.jsonl")
    out = tmp_path / "killed.jsonl"
    partial = tmp_path / "killed.jsonl.work" / ".1-of-1.partial.0.jsonl"
    process = Fork(command(model, *keys, "--out", out))
    deadline = time.monotonic() + 1200
    while time.monotonic() < deadline and not (partial.is_file() and partial.read_bytes().count(b"\n") > 4):
        time.sleep(0.002)
    process.kill()
    process.wait()
    kept = partial.read_bytes().count(b"\n") - 1
    assert 4 <= kept < 3 * len(ENGLISH), "killed too early or too late to show anything"
    assert not out.exists()

    with caplog.at_level("INFO", logger="llamafactory_sekd"):
        sekd_translate(*LANGUAGES, *keys, "--out", out)
    assert f"Continuing, {kept} of {3 * len(ENGLISH)} translations are done." in caplog.text
    assert out.read_bytes() == (tmp_path / "once.jsonl").read_bytes()
    assert len({tuple(one["text"] for one in entry["candidates"]) for entry in jsonl(out)}) == len(ENGLISH)


def test_parts_put_together_are_one_run_and_a_missing_part_is_named(
    text: Path, sekd_translate: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    keys = (*LANGUAGES, "--method", "sample", "--in", text)
    sekd_translate(*keys, "--out", tmp_path / "one.txt")
    out = tmp_path / "parts.txt"
    for number in (1, 3):
        sekd_translate(*keys, "--out", out, "--shard", f"{number}/3")
    assert not out.exists()
    assert "lacks part 2 of 3" in refused(*keys, "--out", out, "--join", 3)
    sekd_translate(*keys, "--out", out, "--shard", "2/3")
    assert "lacks part 1, 2, 3 of 3" in refused(*keys, "--out", out, "--join", 3, "--seed", 7)
    sekd_translate(*keys, "--out", out, "--join", 3)
    assert out.read_bytes() == (tmp_path / "one.txt").read_bytes()


def test_two_ranks_give_what_one_gives(model: Path, text: Path, sekd_translate: Run, tmp_path: Path) -> None:
    keys = ("--method", "sample", "--in", text)
    sekd_translate(*LANGUAGES, *keys, "--out", tmp_path / "one.txt")
    ranks = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    words = command(model, "--method", "sample")
    done = subprocess.run(
        words, input=text.read_bytes(), env={**os.environ, **ranks}, capture_output=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "rank 1 of 2" in done.stderr.decode()
    assert done.stdout == (tmp_path / "one.txt").read_bytes()


def test_mbr_keeps_the_sample_that_sacrebleu_finds_closest_to_all(
    text: Path, sekd_translate: Run, tmp_path: Path
) -> None:
    from sacrebleu.metrics import CHRF

    shared = (*LANGUAGES, "--in", text, "--samples", 5, "--work", tmp_path / "work")
    sekd_translate(*shared, "--method", "sample", "--n-best", 5, "--out", tmp_path / "samples.jsonl")
    sekd_translate(*shared, "--method", "mbr", "--out", tmp_path / "mbr.txt")
    metric = CHRF()
    for entry, found in zip(jsonl(tmp_path / "samples.jsonl"), lines(tmp_path / "mbr.txt"), strict=True):
        samples = [one["text"] for one in entry["candidates"]]
        means = [sum(metric.sentence_score(text, [other]).score for other in samples) for text in samples]
        assert found == samples[means.index(max(means))]
    provenance = json.loads((tmp_path / "work" / "provenance.json").read_text())["request"]
    assert provenance["chosen_by"].startswith("chrF2|nrefs:1|")


def test_mbr_by_comet_keeps_what_the_model_itself_scores_highest(
    text: Path, sekd_translate: Run, tmp_path: Path
) -> None:
    comet = pytest.importorskip("comet", reason="unbabel-comet is not installed (the extra [comet])")
    from helpers.tiny_comet import save_comet

    checkpoint = save_comet(tmp_path / "comet", ENGLISH)
    shared = (*LANGUAGES, "--in", text, "--samples", 3, "--work", tmp_path / "work")
    sekd_translate(*shared, "--method", "sample", "--n-best", 3, "--out", tmp_path / "samples.jsonl")
    sekd_translate(
        *shared, "--method", "mbr", "--metric", "comet", "--comet-model", checkpoint, "--out", tmp_path / "m"
    )
    model = comet.load_from_checkpoint(str(checkpoint))
    found = lines(tmp_path / "m")
    for place, entry in enumerate(jsonl(tmp_path / "samples.jsonl")[:4]):
        samples = [one["text"] for one in entry["candidates"]]
        pairs = [{"src": ENGLISH[place], "mt": mt, "ref": ref} for mt in samples for ref in samples]
        scores = model.predict(pairs, gpus=0, accelerator="cpu", progress_bar=False).scores
        means = [sum(scores[row * 3 : row * 3 + 3]) for row in range(3)]
        assert means[samples.index(found[place])] == pytest.approx(max(means), abs=1e-5)


def test_another_choice_among_the_same_samples_needs_no_model(
    text: Path, sekd_translate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamafactory_sekd.host import translating

    shared = (*LANGUAGES, "--in", text, "--samples", 4, "--work", tmp_path / "work")
    sekd_translate(*shared, "--method", "mbr", "--out", tmp_path / "mbr.txt")
    monkeypatch.setattr(translating, "_load", lambda *_: pytest.fail("the model was loaded"))
    sekd_translate(*shared, "--method", "sample", "--n-best", 2, "--out", tmp_path / "two.jsonl")
    assert all(len(entry["candidates"]) == 2 for entry in jsonl(tmp_path / "two.jsonl"))


def test_columns_records_and_packed_files_give_the_same_translations(
    text: Path, sekd_translate: Run, tmp_path: Path
) -> None:
    sekd_translate(*LANGUAGES, "--in", text, "--out", tmp_path / "plain.txt")
    expected = (tmp_path / "plain.txt").read_bytes()
    pairs = list(zip(ENGLISH, GERMAN, strict=True))
    inputs = {
        "in.gz": gzip.compress(text.read_bytes()),
        "in.tsv": "".join(f"{en}\t{de}\n" for en, de in pairs),
        "in.jsonl": "".join(json.dumps({"translation": {"en": en, "de": de}}) + "\n" for en, de in pairs),
        "mono.jsonl": "".join(json.dumps({"en": en}) + "\n" for en, _ in pairs),
    }
    for name, content in inputs.items():
        out = tmp_path / f"{name}.out.txt.gz"
        sekd_translate(*LANGUAGES, "--in", write(tmp_path / name, content), "--out", out)
        assert gzip.decompress(out.read_bytes()) == expected, name
    folder = tmp_path / "alma" / "deen"
    folder.mkdir(parents=True)
    write(folder / "train.de-en.json", inputs["in.jsonl"])
    sekd_translate("--directions", "en-de", "--alma", tmp_path / "alma", "--out", tmp_path / "alma.txt")
    assert (tmp_path / "alma.txt").read_bytes() == expected


def test_keep_reference_takes_the_candidate_closest_to_it(text: Path, sekd_translate: Run, tmp_path: Path) -> None:
    from sacrebleu.metrics import CHRF

    pairs = write(tmp_path / "in.tsv", "".join(f"{s}\t{r}\n" for s, r in zip(ENGLISH, GERMAN, strict=True)))
    shared = (*LANGUAGES, "--in", pairs, "--method", "sample", "--samples", 4, "--work", tmp_path / "work")
    sekd_translate(*shared, "--n-best", 4, "--out", tmp_path / "all.jsonl")
    sekd_translate(*shared, "--keep", "reference", "--out", tmp_path / "kept.txt")
    for entry, kept, reference in zip(
        jsonl(tmp_path / "all.jsonl"), lines(tmp_path / "kept.txt"), GERMAN, strict=True
    ):
        scores = [CHRF().sentence_score(one["text"], [reference]).score for one in entry["candidates"]]
        assert CHRF().sentence_score(kept, [reference]).score == max(scores)


def test_a_data_set_is_declared_with_its_provenance_and_what_was_left_out(
    text: Path, sekd_translate: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    bad = write(tmp_path / "in.txt", "".join(f"{line}\n" for line in [*ENGLISH[:2], "", *ENGLISH[2:]]))
    keys = (*LANGUAGES, "--in", bad, "--out", tmp_path / "data", "--name", "mt")
    sekd_translate(*keys, "--filters", "empty")
    assert json.loads((tmp_path / "data/dataset_info.json").read_text()) == {"mt": {"file_name": "mt.json"}}
    records = json.loads((tmp_path / "data/mt.json").read_text())
    sekd_translate(*LANGUAGES, "--in", bad, "--out", tmp_path / "out.txt")
    direction = parse_direction("en-de")
    translated = [line for line in lines(tmp_path / "out.txt") if line]
    assert records == [PARROT.record(s, t, direction) for s, t in zip(ENGLISH, translated, strict=True)]
    manifest = json.loads((tmp_path / "data/mt.manifest.json").read_text())
    assert manifest["request"]["method"] == "greedy"
    assert manifest["request"]["chosen_by"] is None
    assert len(manifest["request"]["model"][0]["files"]["model.safetensors"]) == 64
    assert manifest["source"]["software"]["transformers"]
    assert [(one["problem"], one["lines"]) for one in manifest["findings"]] == [("empty_side", [3])]

    # Random words are in no language that was asked for, and say so when all filters look.
    assert "add --overwrite" in refused(*keys)
    sekd_translate(*keys, "--filters", "limit", "--overwrite")
    assert len(json.loads((tmp_path / "data/mt.json").read_text())) < len(ENGLISH)


def test_a_data_set_is_translated_with_the_prompts_of_its_records(
    text: Path, sekd_translate: Run, tmp_path: Path
) -> None:
    direction = parse_direction("en-de")
    records = [PARROT.record(s, r, direction) for s, r in zip(ENGLISH, GERMAN, strict=True)]
    write(tmp_path / "own.json", json.dumps(records))
    write(tmp_path / "dataset_info.json", json.dumps({"own": {"file_name": "own.json"}}))
    sekd_translate("--dataset", "own", "--dataset-dir", tmp_path, "--out", tmp_path / "records.jsonl")
    sekd_translate(*LANGUAGES, "--in", text, "--out", tmp_path / "plain.txt")
    entries = jsonl(tmp_path / "records.jsonl")
    assert [entry["translation"] for entry in entries] == lines(tmp_path / "plain.txt")
    assert [entry["reference"] for entry in entries] == GERMAN
    assert {entry["direction"] for entry in entries} == {"en-de"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "best"), "use one of greedy, beam, sample, mbr"),
        (("--temperature", "0.5"), "`--temperature` has no effect on `--method greedy`"),
        (("--beams", "4"), "`--beams` has no effect"),
        (("--n-best", "2"), "`--n-best 2` is more than `--method greedy` gives"),
        (("--method", "sample", "--n-best", "2"), "does not fit lines of text"),
        (("--method", "mbr", "--samples", "1"), "Nothing can be chosen among one candidate"),
        (("--method", "beam", "--backend", "vllm"), "knows no beam search"),
        (("--shard", "9/8"), "such as 1/8 to 8/8"),
        (("--shard", "1/8"), "need `--out`"),
        (("--filters", "languages"), "did you mean 'language'?"),
        (("--name", "x"), "`--name` needs `--out`"),
        (("--in", "missing.txt"), "Cannot read missing.txt"),
        (("--keep", "all"), "use reference"),
        (("--template", "no_such"), "LLaMA-Factory has no template 'no_such'"),
        (("infer_dtype",), "write key=value"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    refused: Callable[..., str], text: Path, words: tuple[str, ...], said: str
) -> None:
    given = () if "--in" in words else ("--in", text)
    assert said in refused(*LANGUAGES, *given, *words)


@pytest.mark.parametrize("words", [(), ("--to", "de"), ("--from", "en")])
def test_languages_that_nobody_named_are_asked_for(refused: Callable[..., str], text: Path, words: tuple) -> None:
    assert "Name the languages: --from en --to de" in refused(*words, "--in", text)
