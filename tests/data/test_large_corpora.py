"""Corpora of any size: continued where they were killed, held-out pairs apart from what is trained on."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from llamafactory_sekd.data import pairs as pairs_module
from llamafactory_sekd.data.checks import Block, Findings, Pair, clean_pairs
from llamafactory_sekd.data.heldout import _alike, _may_be_alike, hold_out
from llamafactory_sekd.data.languages import Direction
from llamafactory_sekd.data.pairs import Corpus, prepare_pairs
from llamafactory_sekd.data.prompts import PARROT
from llamafactory_sekd.data.readers import json_pairs, read_lines
from llamafactory_sekd.data.testsets import load_test_set
from llamafactory_sekd.errors import DataError
from llamafactory_sekd.host.data_command import app


EN_DE = Direction("en", "de")
_DRAW = random.Random(0)
WORDS = ["".join(_DRAW.choices("abcdefghijklmnopqrstuvwxyzäöü", k=_DRAW.randint(3, 9))) for _ in range(400)]


def made_up(count: int, seed: int = 0) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    return [(" ".join(draw.choices(WORDS, k=12)), " ".join(draw.choices(WORDS, k=12)).upper()) for _ in range(count)]


def save(folder: Path, pairs: list[tuple[str, str]]) -> Corpus:
    for name, side in (("x.en", 0), ("x.de", 1)):
        (folder / name).write_text("".join(f"{pair[side]}\n" for pair in pairs), encoding="utf-8")
    return Corpus.of(folder / "x.en", folder / "x.de", None)


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


@pytest.mark.parametrize("keys", [{}, {"both": True, "valid": 20, "test": 30}], ids=["plain", "held out"])
def test_a_killed_run_is_continued_and_gives_the_same_bytes(tmp_path: Path, monkeypatch, keys) -> None:
    corpus = save(tmp_path, [*made_up(3000), ("", "leer"), *made_up(3000, seed=1)])
    monkeypatch.setattr(pairs_module, "_BLOCK", 100)
    monkeypatch.setattr(pairs_module, "_NOTED", 500)
    prepare_pairs(corpus, EN_DE, "mine", tmp_path / "once", **keys)
    seen: list[str] = []

    class Killed(BaseException):
        pass

    def kill(what: str, done: int, total: int, number: int) -> None:
        seen.append(what)
        if what == "Writing" and number > 4200:
            raise Killed

    with pytest.raises(Killed):
        prepare_pairs(corpus, EN_DE, "mine", tmp_path / "twice", progress=kill, **keys)
    assert not (tmp_path / "twice" / "mine.jsonl").exists()
    seen.clear()
    prepare_pairs(corpus, EN_DE, "mine", tmp_path / "twice", progress=kill, **keys)
    assert "Writing" not in seen
    assert any(what.startswith("Continuing at pair 4,") for what in seen)
    assert content(tmp_path / "once") == content(tmp_path / "twice")
    assert not list((tmp_path / "twice").glob(".mine*"))


def test_a_run_that_ends_between_the_file_and_the_manifest_is_finished_by_the_next(
    tmp_path: Path, monkeypatch
) -> None:
    corpus = save(tmp_path, made_up(500))
    prepare_pairs(corpus, EN_DE, "mine", tmp_path / "once")

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llamafactory_sekd.data.products._manifest", end)
    with pytest.raises(KeyboardInterrupt):
        prepare_pairs(corpus, EN_DE, "mine", tmp_path / "twice")
    monkeypatch.undo()
    assert (tmp_path / "twice" / "mine.jsonl").exists()
    prepare_pairs(corpus, EN_DE, "mine", tmp_path / "twice")
    assert content(tmp_path / "once") == content(tmp_path / "twice")


def test_the_real_command_survives_a_kill(tmp_path: Path) -> None:
    save(tmp_path, made_up(600) * 2500)
    arguments = ["--src", str(tmp_path / "x.en"), "--tgt", str(tmp_path / "x.de"), "--from", "en", "--to", "de"]
    line = [sys.executable, "-m", "llamafactory_sekd.cli", "data", "pairs", *arguments, "--name", "mine", "--out"]
    child = subprocess.Popen([*line, str(tmp_path / "out")], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    notes = tmp_path / "out" / ".mine.jsonl.progress.json"
    while not notes.exists() and child.poll() is None:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert notes.exists()
    assert not (tmp_path / "out" / "mine.jsonl").exists()
    again = subprocess.run([*line, str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert "Continuing at pair" in again.stderr
    with open(tmp_path / "out" / "mine.jsonl", encoding="utf-8") as stream:
        assert sum(1 for _ in stream) == 1_500_000


def test_another_request_does_not_continue(tmp_path: Path, monkeypatch) -> None:
    corpus = save(tmp_path, made_up(300))
    monkeypatch.setattr(pairs_module, "_BLOCK", 10)
    monkeypatch.setattr(pairs_module, "_NOTED", 100)

    def stop(what: str, done: int, total: int, number: int) -> None:
        if number > 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_pairs(corpus, EN_DE, "mine", tmp_path / "out", progress=stop)
    prepare_pairs(corpus, EN_DE, "mine", tmp_path / "out", both=True)
    assert len(records(tmp_path / "out" / "mine.jsonl")) == 600


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, made_up(3000))
    arguments = ["--src", str(tmp_path / "x.en"), "--tgt", str(tmp_path / "x.de"), "--from", "en", "--to", "de"]
    line = f"ulimit -f 200; exec {sys.executable} -m llamafactory_sekd.cli data pairs {' '.join(arguments)}"
    out = tmp_path / "out"
    full = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; {line} --name mine --out {out}"], capture_output=True, text=True, check=False
    )
    assert full.returncode == 2
    assert "Traceback" not in full.stderr
    message = full.stderr.strip().splitlines()[-1]
    assert "Cannot write" in message
    assert "mine.jsonl" in message
    assert [path.name for path in out.iterdir() if "mine" in path.name] == []


def test_held_out_pairs_are_test_sets_and_nothing_near_to_them_is_trained_on(tmp_path: Path) -> None:
    pairs = made_up(800)
    near = [(f"{s.capitalize()}!", t) for s, t in pairs] + [(f"{s} 17", f"ganz anders {t[::-1]}") for s, t in pairs]
    corpus = save(tmp_path, [*pairs, *near])
    manifest, _ = prepare_pairs(corpus, EN_DE, "mine", tmp_path / "out", valid=30, test=40, both=True)

    valid = load_test_set("mine_valid", tmp_path / "out", "en-de")
    test = load_test_set("mine_test", tmp_path / "out", "de-en")
    assert (len(valid.sources), len(test.sources)) == (30, 40)
    assert len(records(tmp_path / "out" / "mine_valid.jsonl")) == 60
    assert json.loads((tmp_path / "out" / "dataset_info.json").read_text()).keys() == {"mine", "mine_valid"}

    def plain(text: str) -> str:
        return "".join(character for character in text.lower() if character.isalpha())

    held = {plain(text) for text in (*valid.sources, *valid.references, *test.sources, *test.references)}
    assert len(held) == 140
    trained = {plain(r[key]) for r in records(tmp_path / "out" / "mine.jsonl") for key in ("input", "output")}
    assert not held & trained
    (left_out,) = (f for f in manifest["findings"] if f["problem"] == "near_duplicate")
    assert left_out["count"] >= 2 * 70  # the two others of each
    assert len(records(tmp_path / "out" / "mine.jsonl")) == 2 * (2400 - 70 - left_out["count"])


def test_one_changed_word_is_near_and_another_sentence_is_not() -> None:
    held = hold_out([Block.of([Pair(f"{s}", t, "f", number) for number, (s, t) in enumerate(made_up(200))])], 20)
    first = held.pairs[0]
    words = first.source.split()
    middle = Pair(" ".join([*words[:5], "etwas", *words[6:]]), "neue Zeile", "f", 1)
    half = Pair(" ".join([*words[:4], *WORDS[::-1]]), "ganz neu", "f", 1)
    none = Pair("gar nicht dabei", "not at all", "f", 1)
    assert held.near(Block.of([first, middle, half, none])) == [True, True, False, False]


def test_likeness_is_the_share_of_common_trigrams_and_the_quick_look_overlooks_none() -> None:
    draw = random.Random(0)
    texts, others, likenesses = [], [], []
    for _ in range(500):
        text = "".join(draw.choices("abcde", k=draw.randint(12, 60)))
        other = "".join(letter if draw.random() < 0.86 else draw.choice("abcdefg") for letter in text)
        texts.append(text)
        others.append(other[: len(other) - draw.randint(0, 8)])
        likenesses.append(_alike(text, others[-1]))
    assert likenesses == [are_alike(text, other) for text, other in zip(texts, others, strict=True)]
    assert 50 < sum(likenesses) < 450
    may_be = _may_be_alike(list(zip(range(500), texts, others, strict=True)))
    assert [alike for alike, may in zip(likenesses, may_be, strict=True) if not may and alike] == []
    assert sum(may_be) < 450


def letters_of(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalpha())


def are_alike(text: str, held: str) -> bool:
    ours, theirs = ({one[place : place + 3] for place in range(len(one) - 2)} for one in (text, held))
    far_apart = 2 * min(len(text), len(held)) < 0.7 * (len(text) + len(held))
    return not far_apart and 2 * len(ours & theirs) >= 0.7 * (len(ours) + len(theirs))


def ends_of(pair: Pair) -> list[str]:
    sides = letters_of(pair.source), letters_of(pair.target)
    return [sides[0][:12], sides[0][-12:], sides[1][:12], sides[1][-12:]]


def held_out_and_kept(pairs: list[Pair], count: int) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Return what is held out, what is left out for it and what is kept, each pair compared with each that is held."""
    by_checksum: dict[int, Pair] = {}
    for pair in pairs:
        by_checksum.setdefault(zlib.crc32(pair.source.encode("utf-8", "surrogatepass")), pair)
    held: list[Pair] = []
    for _, pair in sorted(by_checksum.items())[: 4 * count + 100]:
        for clean in clean_pairs([pair], Findings()):
            enough = min(len(letters_of(clean.source)), len(letters_of(clean.target))) >= 6
            taken = any(end == other for one in held for end, other in zip(ends_of(clean), ends_of(one), strict=True))
            if len(held) < count and clean.source != clean.target and enough and not taken:
                held.append(clean)

    def is_near(pair: Pair) -> bool:
        return any(
            end == other and are_alike(letters_of(pair[place // 2]), letters_of(one[place // 2]))
            for one in held
            for place, (end, other) in enumerate(zip(ends_of(pair), ends_of(one), strict=True))
        )

    lines = {pair.line for pair in held}
    others = [pair for pair in clean_pairs(pairs, Findings()) if pair.line not in lines]
    return held, [pair for pair in others if is_near(pair)], [pair for pair in others if not is_near(pair)]


# Letters that become two or three without their case or none, more than 16 bits, signs of several scripts.
LETTERS = ["abcdeABC ,.", "abßäÖİ „“–12 ", "абвГДЕё ", "漢字仮名。、 ", "𐐀𐐨😀aé\u0301ﬃŉև ǰ\u00ad", "ab"]


def random_pairs(draw: random.Random) -> list[tuple[str, str]]:
    """Make up pairs of which many differ little from another one."""

    def sentence() -> str:
        return "".join(draw.choices(draw.choice(LETTERS), k=draw.choice([3, 8, 14, 17, 18, 19, 25, 60])))

    def changed(text: str) -> str:
        for _ in range(draw.randint(0, 3)):
            at = draw.randint(0, len(text))
            middle = text[:at] + draw.choice(["z", "", "Q ", "-"]) + text[at + draw.randint(0, 5) :]
            after, before = text + draw.choice(["!", " 17", sentence()]), draw.choice(["«", "(" * 18, "x"]) + text
            text = draw.choice([text.upper(), middle, after, before])
        return text

    pairs = [(sentence(), sentence()) for _ in range(draw.randint(1, 40))]
    pairs += [tuple(map(changed, draw.choice(pairs))) for _ in range(draw.randint(0, 80))]
    return draw.sample(pairs, len(pairs))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 12))
def test_what_is_written_is_what_comparing_each_pair_with_each_gives(seed: int, count: int) -> None:
    texts = random_pairs(random.Random(seed))
    read = [Pair(source, target, "x.json", line) for line, (source, target) in enumerate(texts, start=1)]
    held, near, kept = held_out_and_kept(read, count)
    assume(kept and len(held) == count)
    with TemporaryDirectory() as name, mock.patch.object(pairs_module, "_BLOCK", 30):
        folder = Path(name)
        (folder / "x.json").write_text(json.dumps([{"en": source, "de": target} for source, target in texts]))
        corpus = Corpus.of(None, None, None, folder / "x.json")
        manifest, _ = prepare_pairs(corpus, EN_DE, "mine", folder / "out", test=count)
        written = content(folder / "out")

    for side, language in enumerate(("en", "de")):
        assert written[f"mine_test/en-de.{language}"].decode() == "".join(f"{pair[side]}\n" for pair in held)
    lines = [json.dumps(PARROT.record(pair.source, pair.target, EN_DE), ensure_ascii=False) for pair in kept]
    assert written["mine.jsonl"].decode() == "".join(f"{line}\n" for line in lines)
    found = {finding["problem"]: finding["lines"] for finding in manifest["findings"]}
    assert found.get("near_duplicate", []) == [pair.line for pair in near]


def test_more_to_hold_out_than_there_is_stops_with_the_numbers(tmp_path: Path) -> None:
    corpus = save(tmp_path, [("eins zwei drei", "one two three")] * 100)
    with pytest.raises(DataError, match=r"ask for 3 pairs, and only 1 of the 1 candidates .* ask for fewer"):
        prepare_pairs(corpus, EN_DE, "mine", tmp_path / "out", test=3)


def test_quotation_marks_of_a_spreadsheet_are_reported_and_read_where_asked(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text('"He said ""no"""\t"Er sagte ""nein"""\n"Yes"\tJa\n"two\nlines"\tzwei\n')
    base = ["pairs", "--tsv", str(tmp_path / "x.tsv"), "--from", "en", "--to", "de", "--name", "mine"]
    read = CliRunner().invoke(app, [*base, "--out", str(tmp_path / "a"), "--quoted"])
    assert read.exit_code == 0, read.output
    assert [(r["input"], r["output"]) for r in records(tmp_path / "a" / "mine.jsonl")] == [
        ('He said "no"', 'Er sagte "nein"'),
        ("Yes", "Ja"),
        ("two lines", "zwei"),
    ]
    (tmp_path / "x.tsv").write_text('"He said ""no"""\t"Er sagte ""nein"""\n"Yes"\t"Ja"\n')
    kept = CliRunner().invoke(app, [*base, "--out", str(tmp_path / "b")])
    assert "1 pair kept: has doubled quotation marks" in kept.stdout
    assert records(tmp_path / "b" / "mine.jsonl")[1]["input"] == '"Yes"'
    (tmp_path / "x.tsv").write_text('"never closed\tx\nnext\ty\n')
    broken = CliRunner().invoke(app, [*base, "--out", str(tmp_path / "c"), "--quoted"])
    assert "x.tsv:1: the quotation marks are not those of a spreadsheet" in str(broken.exception)


def test_findings_are_counted_exactly_and_their_lines_are_bounded(tmp_path: Path) -> None:
    corpus = save(tmp_path, [("", "leer")] * 2500 + [("voll", "full")])
    manifest, _ = prepare_pairs(corpus, EN_DE, "mine", tmp_path / "out")
    (finding,) = manifest["findings"]
    assert (finding["count"], finding["lines"]) == (2500, list(range(1, 1001)))
    assert Findings.from_json(manifest["findings"]).as_json() == manifest["findings"]


@pytest.mark.parametrize("text", ["a\r\nb\r\nc", "a\nb\nc\n", "a\r\nb\r\nc\r\n", "\ufeffa\nb\nc"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
def test_lines_are_the_same_however_the_file_is_read(tmp_path: Path, monkeypatch, text: str, chunk: int) -> None:
    monkeypatch.setattr("llamafactory_sekd.data.readers._CHUNK", chunk)
    (tmp_path / "x.gz").write_bytes(gzip.compress(text.encode()))
    assert read_lines(tmp_path / "x.gz") == ["a", "b", "c"]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_json_list_is_read_item_by_item(tmp_path: Path, monkeypatch, chunk: int) -> None:
    monkeypatch.setattr("llamafactory_sekd.data.readers._CHUNK", chunk)
    items = [{"translation": {"en": f"a [{n}], ", "de": "b\\"}} for n in range(5)]
    path = tmp_path / "x.json"
    path.write_text("\n" + json.dumps(items, indent=1) + "\n ")
    assert [(pair.source, pair.line) for pair in list(json_pairs(path, EN_DE))] == [
        (f"a [{n}], ", n + 1) for n in range(5)
    ]
    for broken, words in (
        (json.dumps(items)[:-1], "Expecting"),
        (json.dumps(items) + "x", "Extra data"),
        ("[1 2]", "Expecting ','|expected"),
        ("[\n\n{]", r"x\.json:3"),
    ):
        path.write_text(broken)
        with pytest.raises(DataError, match=words):
            list(json_pairs(path, EN_DE))


def test_a_pipe_is_called_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.en")
    with pytest.raises(DataError, match=r"x\.en is a pipe, and is read more than once: give a file"):
        prepare_pairs(Corpus.of(tmp_path / "x.en", tmp_path / "x.en", None), EN_DE, "mine", tmp_path / "out")


def test_the_host_reads_what_was_written(tmp_path: Path) -> None:
    from datasets import load_dataset

    prepare_pairs(save(tmp_path, made_up(50)), EN_DE, "mine", tmp_path / "out")
    loaded = load_dataset(
        "json", data_files=str(tmp_path / "out" / "mine.jsonl"), cache_dir=str(tmp_path), split="train"
    )
    assert loaded.to_list() == records(tmp_path / "out" / "mine.jsonl")
