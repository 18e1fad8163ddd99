"""``sekd data alma``: counts on the real files, complete files only, and a second run that changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import typer
from helpers.alma_files import TRICKY, write_alma
from typer.testing import CliRunner

from llamafactory_sekd.data.alma import (
    ALMA_LANGUAGES,
    DEFAULT_LANGUAGES,
    VALIDATION,
    VALIDATION_NAME,
    DirectorySource,
    HubSource,
    alma_name,
    command_for,
    joint_alma_name,
    make_plan,
    prepare_alma,
    wmt21_name,
    wmt22_name,
)
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.errors import ArgumentError, DataError
from llamafactory_sekd.files import locked
from llamafactory_sekd.host.data_command import app


# The paper's 52K and its test sets; the counts of ALMA's files.
COUNTS = {
    "alma_en_de_cs": 52_574,
    "alma_en_de": 14_211,
    "alma_de_en": 14_211,
    "alma_en_cs": 12_076,
    "alma_cs_en": 12_076,
    "wmt21_valid": 2_004,
    "wmt21_en_de": 1_002,
    "wmt21_de_en": 1_002,
    "wmt21_en_cs": 1_002,
    "wmt21_cs_en": 1_002,
    "wmt22_de_en": 1_984,
    "wmt22_en_de": 2_037,
    "wmt22_en_cs": 2_037,
    "wmt22_cs_en": 1_448,
}
# Copied sentences in WMT's own sets: foreign quotations, names, result lists.
SUSPICIOUS = {"decomposed": 26, "invisible_character": 18, "mojibake": 3}
IDENTICAL = {"deen/train.de-en.json": 8, "deen/test.de-en.json": 1, "csen/train.cs-en.json": 2}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def real(alma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "alma"
    prepare_alma(DirectorySource(alma_dir), make_plan(["de-en", "cs-en"]), out)
    return out


@pytest.fixture
def source(tmp_path: Path) -> DirectorySource:
    return DirectorySource(write_alma(tmp_path / "ALMA"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "alma"


DE = make_plan(["de-en"])


def _snapshot(directory: Path) -> dict[str, tuple[int, int, str]]:
    return {
        path.relative_to(directory).as_posix(): (
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".sekd.lock"
    }


def _contents(directory: Path) -> dict[str, str]:
    return {name: digest for name, (_, _, digest) in _snapshot(directory).items()}


def test_real_files_give_the_papers_counts(real: Path) -> None:
    for name, count in COUNTS.items():
        assert len(json.loads((real / f"{name}.json").read_text(encoding="utf-8"))) == count, name
    for direction in ("de-en", "en-de", "en-cs", "cs-en"):
        for side in direction.split("-"):
            lines = (real / "wmt22" / f"{direction}.{side}").read_bytes().count(b"\n")
            assert lines == COUNTS[f"wmt22_{direction.replace('-', '_')}"]


def test_suspicious_real_pairs_are_kept_and_reported_and_nothing_is_left_out(real: Path) -> None:
    findings = json.loads((real / "manifest.json").read_text(encoding="utf-8"))["findings"]
    totals: Counter[str] = Counter()
    for finding in findings:
        totals[finding["problem"]] += finding["count"]

    identical = {finding["file"]: finding["count"] for finding in findings if finding["problem"] == "identical_sides"}
    assert identical == IDENTICAL
    assert totals - Counter(identical_sides=totals["identical_sides"]) == SUSPICIOUS
    assert {finding["outcome"] for finding in findings} == {"kept"}


def test_real_files_survive_the_round_trip_sentence_by_sentence(real: Path, alma_dir: Path) -> None:
    def original(name: str) -> list[dict[str, str]]:
        text = (alma_dir / "human_written_data" / name).read_text(encoding="utf-8")
        records = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
        return [record["translation"] for record in records]

    def pairs(name: str) -> list[tuple[str, str]]:
        return [(r["input"], r["output"]) for r in json.loads((real / name).read_text(encoding="utf-8"))]

    for code in ("de", "cs"):
        train = original(f"{code}en/train.{code}-en.json")
        assert pairs(f"alma_{code}_en.json") == [(one[code], one["en"]) for one in train]
        assert pairs(f"alma_en_{code}.json") == [(one["en"], one[code]) for one in train]
        for source, target in ((code, "en"), ("en", code)):
            test = original(f"{code}en/test.{source}-{target}.json")
            loaded = load_test_set("wmt22", real, f"{source}-{target}")
            assert pairs(f"wmt22_{source}_{target}.json") == [(one[source], one[target]) for one in test]
            assert list(loaded.sources) == [one[source] for one in test]
            assert list(loaded.references) == [one[target] for one in test]


def test_validation_set_is_the_papers_en_de_and_cs_en(real: Path) -> None:
    valid = json.loads((real / "wmt21_valid.json").read_text(encoding="utf-8"))
    parts = [json.loads((real / f"wmt21_{name}.json").read_text(encoding="utf-8")) for name in ("en_de", "cs_en")]

    assert valid == parts[0] + parts[1]
    assert "from English to German" in valid[0]["instruction"]
    assert "from Czech to English" in valid[-1]["instruction"]


def test_joint_training_set_is_all_directions_one_after_the_other(real: Path) -> None:
    joint = json.loads((real / "alma_en_de_cs.json").read_text(encoding="utf-8"))
    names = ("alma_en_de", "alma_de_en", "alma_en_cs", "alma_cs_en")

    assert joint == [r for name in names for r in json.loads((real / f"{name}.json").read_text(encoding="utf-8"))]


def test_two_runs_write_identical_bytes(source: DirectorySource, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare_alma(source, DE, tmp_path / name)
    shutil.copytree(source.directory, tmp_path / "elsewhere")  # the place of the source leaves no trace
    prepare_alma(DirectorySource(tmp_path / "elsewhere" / "human_written_data"), DE, tmp_path / "three")

    assert _contents(tmp_path / "one") == _contents(tmp_path / "two") == _contents(tmp_path / "three")


def test_tricky_text_reaches_json_and_plain_files_unchanged(source: DirectorySource, out: Path) -> None:
    prepare_alma(source, DE, out)

    records = json.loads((out / "alma_de_en.json").read_text(encoding="utf-8"))
    assert [(record["input"], record["output"]) for record in records] == TRICKY
    loaded = load_test_set("wmt22", out, "de-en")
    assert list(zip(loaded.sources, loaded.references, strict=True)) == TRICKY


def test_second_run_verifies_and_touches_nothing(source: DirectorySource, out: Path) -> None:
    first, made = prepare_alma(source, DE, out)
    before = _snapshot(out)
    steps: list[str] = []
    second, made_again = prepare_alma(source, DE, out, step=steps.append)

    assert (made, made_again) == (True, False)
    assert second == first
    assert steps == []
    assert _snapshot(out) == before


def test_manifest_lists_the_files_on_disk(source: DirectorySource, out: Path) -> None:
    manifest, _ = prepare_alma(source, DE, out)

    on_disk = set(_contents(out)) - {"manifest.json", "dataset_info.json"}
    assert set(manifest["files"]) == on_disk
    for name, entry in manifest["files"].items():
        data = (out / name).read_bytes()
        assert entry == {"records": 9, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    inputs = manifest["request"]["source"]["files"]
    train = (source.root / "deen" / "train.de-en.json").read_bytes()
    assert inputs["deen/train.de-en.json"] == hashlib.sha256(train).hexdigest()
    assert "MIT" in manifest["licence"]
    assert manifest["source"] == {"kind": "directory", "revision": None}


def test_revision_is_the_clones_commit(source: DirectorySource, out: Path) -> None:
    git = ["git", "-C", str(source.directory), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "data"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    assert prepare_alma(source, DE, out)[0]["source"]["revision"] == head
    nested = DirectorySource(source.root)
    assert nested.revision()["revision"] == head
    deep = source.directory / "vendor" / "alma"
    shutil.copytree(source.root, deep)
    assert DirectorySource(deep).revision()["revision"] is None  # a copy inside somebody's repository


def test_flipped_byte_is_found_and_overwrite_repairs_it(source: DirectorySource, out: Path) -> None:
    prepare_alma(source, DE, out)
    contents = _contents(out)
    path = out / "wmt22" / "en-de.de"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)

    with pytest.raises(DataError, match=r"wmt22/en-de\.de was changed after it was written .* add --overwrite"):
        prepare_alma(source, DE, out)
    assert path.read_bytes() == data  # not ours to repair unasked
    prepare_alma(source, DE, out, overwrite=True)
    assert _contents(out) == contents


def test_missing_file_is_named(source: DirectorySource, out: Path) -> None:
    prepare_alma(source, DE, out)
    (out / "alma_de_en.json").unlink()
    with pytest.raises(DataError, match=r"alma_de_en\.json is missing although .*manifest\.json names it"):
        prepare_alma(source, DE, out)


@pytest.mark.parametrize("name", ["../victim", "wmt22/../../victim", "/etc/hostname", "link/victim"])
def test_manifest_cannot_lead_out_of_its_directory(
    source: DirectorySource, out: Path, tmp_path: Path, name: str
) -> None:
    prepare_alma(source, DE, out)
    (tmp_path / "victim").write_text("precious")
    (out / "link").symlink_to(tmp_path)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"] = {name: {"records": 1, "bytes": 8, "sha256": hashlib.sha256(b"precious").hexdigest()}}
    (out / "manifest.json").write_text(json.dumps(manifest))

    for overwrite in (False, True):  # overwriting removes what the former manifest names
        with pytest.raises(DataError, match="leads out of"):
            prepare_alma(source, DE, out, overwrite=overwrite)
    assert (tmp_path / "victim").read_text() == "precious"


def test_other_request_needs_overwrite_and_then_removes_what_it_no_longer_wants(
    source: DirectorySource, out: Path
) -> None:
    prepare_alma(source, DE, out)
    one_way = make_plan(["de-en"], ["en-de"])
    with pytest.raises(DataError, match=r"alma was created with different options \(source, directions\)"):
        prepare_alma(source, one_way, out)
    prepare_alma(source, one_way, out, overwrite=True)

    assert not (out / "alma_de_en.json").exists()
    assert (out / "alma_en_de.json").exists()


def test_changed_source_is_another_request(source: DirectorySource, out: Path) -> None:
    prepare_alma(source, DE, out)
    write_alma(source.directory, TRICKY[:3])
    with pytest.raises(DataError, match=r"created with different options \(source\)"):
        prepare_alma(source, DE, out)


def test_foreign_file_in_the_way_is_not_overwritten(source: DirectorySource, out: Path) -> None:
    out.mkdir()
    (out / "alma_de_en.json").write_text("mine")
    with pytest.raises(DataError, match=r"alma_de_en\.json exists with other content: add --overwrite"):
        prepare_alma(source, DE, out)
    assert sorted(path.name for path in out.iterdir()) == [".sekd.lock", "alma_de_en.json"]


def test_bad_lines_of_the_source_are_left_out_in_both_directions_and_reported_once(tmp_path: Path, out: Path) -> None:
    pairs = [*TRICKY[:2], ("", "nothing"), ("Zeile\neins", "line one"), ("Zagreb", "Zagreb")]
    manifest, _ = prepare_alma(DirectorySource(write_alma(tmp_path / "ALMA", pairs)), DE, out)

    train = [f for f in manifest["findings"] if f["file"] == "deen/train.de-en.json"]
    assert [(f["problem"], f["outcome"], f["lines"]) for f in train] == [
        ("empty_side", "left out", [3]),
        ("line_break", "repaired", [4]),
        ("identical_sides", "kept", [5]),
    ]
    for name in ("alma_de_en", "alma_en_de", "wmt22_en_de"):
        assert manifest["files"][f"{name}.json"]["records"] == 4
    assert (out / "wmt22" / "de-en.de").read_text(encoding="utf-8").split("\n")[2] == "Zeile eins"


def test_icelandic_has_no_validation_and_reads_its_training_text_files(tmp_path: Path, out: Path) -> None:
    root = write_alma(tmp_path / "ALMA", [("Góðan dag!", "Good day!"), ("Takk.", "Thanks.")], code="is")
    folder = root / "human_written_data" / "isen"
    for name in ("valid.is-en.json", "train.is-en.json"):
        (folder / name).unlink()
    (folder / "train.is-en.is").write_text("Góðan dag!\nTakk.\n", encoding="utf-8")
    (folder / "train.is-en.en").write_text("Good day!\nThanks.\n", encoding="utf-8")
    manifest, _ = prepare_alma(DirectorySource(root), make_plan(["is-en"]), out)

    names = {"alma_en_is", "alma_is_en", "wmt22_en_is", "wmt22_is_en"}
    assert {Path(name).stem for name in manifest["files"] if name.endswith(".json")} == names
    record = json.loads((out / "alma_en_is.json").read_text(encoding="utf-8"))[1]
    assert (record["input"], record["output"]) == ("Thanks.", "Takk.")
    assert "from English to Icelandic" in record["instruction"]


def test_plan_refuses_what_alma_does_not_have() -> None:
    with pytest.raises(ArgumentError, match="--pairs names 'fr-en', which ALMA does not have: use de-en, cs-en"):
        make_plan(["fr-en"])
    with pytest.raises(ArgumentError, match="--directions names 'en-cs', which is not among the --pairs de-en"):
        make_plan(["de-en"], ["en-cs"])
    with pytest.raises(ArgumentError, match="--pairs is empty"):
        make_plan([])


def test_missing_source_file_is_named_before_anything_is_written(source: DirectorySource, out: Path) -> None:
    with pytest.raises(DataError, match=r"csen/train\.cs-en\.json not found: is it a clone of ALMA"):
        prepare_alma(source, make_plan(["de-en", "cs-en"]), out)
    assert not out.exists()
    with pytest.raises(DataError, match=r"--source .*nowhere is not a directory: give a clone"):
        DirectorySource(out / "nowhere")


def test_second_writer_is_refused(source: DirectorySource, out: Path) -> None:
    with locked(out / ".sekd.lock"), pytest.raises(DataError, match="Another run is writing to"):
        prepare_alma(source, DE, out)


def test_hub_data_equals_the_clones(source: DirectorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``load_dataset`` on local copies of the hub's two repositories, laid out as they are there."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"de": foreign, "en": english} for foreign, english in TRICKY]
    layout = {
        "train": {"de-en": {"train": "translation", "validation": "translation"}},
        "test": {"de-en": {"test": "de-en"}, "en-de": {"test": "en-de"}},
    }
    for repository, configs in layout.items():
        card = ["---", "configs:"]
        for config, splits in configs.items():
            card += [f"- config_name: {config}", "  data_files:"]
            for split, column in splits.items():
                table = datasets.Dataset.from_dict({column: rows})
                (tmp_path / repository / config).mkdir(parents=True, exist_ok=True)
                table.to_parquet(tmp_path / repository / config / f"{split}-00000-of-00001.parquet")
                card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
        (tmp_path / repository / "README.md").write_text("\n".join([*card, "---", ""]))

    hub = HubSource(str(tmp_path / "train"), str(tmp_path / "test"))
    prepare_alma(hub, DE, tmp_path / "from_hub")
    prepare_alma(source, DE, tmp_path / "from_clone")
    one, two = _contents(tmp_path / "from_hub"), _contents(tmp_path / "from_clone")
    assert {name for name in one if one[name] != two.get(name)} == {"manifest.json"}


def test_unreachable_hub_gives_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = HubSource(str(tmp_path / "nothing"), "x/y")
    with pytest.raises(DataError, match=r"Cannot load .*nothing/de-en/train from the Hugging Face hub .*--source DIR"):
        prepare_alma(hub, DE, tmp_path / "out")


def test_hub_revision_is_read_from_the_loaded_addresses() -> None:
    from llamafactory_sekd.data.alma import _hub_revision

    commit = "0123456789abcdef0123456789abcdef01234567"
    address = f"hf://datasets/haoranxu/WMT22-Test@{commit}/en-de/test-00000-of-00001-1a83a591805d9178.parquet"
    assert _hub_revision({address: {"num_bytes": 1}}) == commit
    assert _hub_revision(None) is None


def _alma_process(alma_dir: Path, out: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from llamafactory_sekd.host.data_command import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", code, "alma", "--source", str(alma_dir), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _killed_in_the_second_file(alma_dir: Path, out: Path) -> bool:
    process = _alma_process(alma_dir, out)
    while process.poll() is None and len(list(out.glob("*.json")) + list(out.glob(".*.partial"))) < 2:
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL and not (out / "manifest.json").exists()


def test_killed_run_leaves_no_half_file_and_the_next_one_finishes(alma_dir: Path, real: Path, tmp_path: Path) -> None:
    # On a busy machine a run may end before it is killed.
    attempts = (tmp_path / str(number) for number in range(5))
    out = next(path for path in attempts if _killed_in_the_second_file(alma_dir, path))

    contents = _contents(real)
    left = _contents(out)
    assert left
    for name, digest in left.items():
        assert Path(name).name.endswith(".partial") or digest == contents[name], name

    assert _alma_process(alma_dir, out).wait() == 0
    assert _contents(out) == contents


def test_command_prints_counts_findings_and_how_to_use_them(alma_dir: Path, out: Path) -> None:
    result = CliRunner().invoke(app, ["alma", "--source", str(alma_dir), "--out", str(out)])
    again = CliRunner().invoke(app, ["alma", "--source", str(alma_dir), "--out", str(out)])

    assert (result.exit_code, again.exit_code) == (0, 0)
    for shown in ("Written to", "52,574", "2,037", "1,448"):
        assert shown in result.stdout
    expected = (
        "8 pairs kept: the two sides are the same: deen/train.de-en.json:4404, 6263, 6510, 7222, 7239 and 3 more"
    )
    assert expected in result.stdout
    usage = f"dataset_dir: {out}, dataset: alma_en_de_cs, eval_dataset: wmt21_valid, template: parrot"
    assert usage in result.stdout
    assert "Verified in" in again.stdout


def shipped_entries() -> dict[str, dict[str, str]]:
    """Return the content of the project's ``data/dataset_info.json``: all that ``sekd data alma`` can make."""
    both = [pair for code in ALMA_LANGUAGES for pair in (Direction("en", code), Direction(code, "en"))]
    names = [joint_alma_name(DEFAULT_LANGUAGES), joint_alma_name(ALMA_LANGUAGES)]
    names += [alma_name(direction) for direction in both]
    names += [VALIDATION_NAME]
    names += [wmt21_name(d) for d in both if {d.source, d.target} & set(VALIDATION)]
    names += [wmt22_name(direction) for direction in both]
    return {name: {"file_name": f"alma/{name}.json"} for name in names}


def test_shipped_dataset_info_declares_what_the_command_makes(real: Path) -> None:
    shipped = json.loads((REPOSITORY / "data" / "dataset_info.json").read_text())
    own = json.loads((real / "dataset_info.json").read_text())

    assert {name: shipped[name] for name in shipped_entries()} == shipped_entries()
    assert set(own) == set(COUNTS)
    assert {name: f"alma/{entry['file_name']}" for name, entry in own.items()} == {
        name: shipped[name]["file_name"] for name in own
    }


def test_the_command_for_every_shipped_dataset_would_make_it() -> None:
    for name in shipped_entries():
        command = command_for(name)
        assert command is not None, name
        options = command.split("--pairs ")
        plan = make_plan((options[1] if len(options) > 1 else "de-en,cs-en").split(","))
        languages = {code for code in name.split("_")[1:] if code not in ("en", "valid")}
        assert languages <= set(plan.languages), (name, command)
        if name.startswith("alma_en_de_cs"):
            assert tuple(name.split("_")[2:]) == plan.languages


def test_every_command_of_the_documentation_is_one() -> None:
    text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("sekd data ")]
    group = typer.main.get_command(app)

    assert len(commands) == 11
    for _, _, name, *arguments in commands:
        group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
    for name, count in COUNTS.items():
        assert f"`{name}`" in text
        assert f"{count:,}" in text


@pytest.mark.parametrize(
    "name", ["alpaca_en_demo", "alma_en_fr", "alma_en", "wmt22_de_cs", "wmt22_en", "alma_en_cs_de"]
)
def test_other_names_have_no_command_of_ours(name: str) -> None:
    assert command_for(name) is None
