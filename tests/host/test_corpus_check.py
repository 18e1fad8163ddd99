"""``sekd data check``: what a teacher makes of a corpus, and which pairs look wrong."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch
from helpers.forks import forked
from helpers.tiny import SENTENCES
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_sekd.data.checks import Pair
from llamafactory_sekd.data.languages import parse_direction
from llamafactory_sekd.data.prompts import prompt
from llamafactory_sekd.errors import ArgumentError, DataError
from llamafactory_sekd.host.corpus import LENGTH_FACTOR, check_corpus, read_with
from llamafactory_sekd.teacher.doubts import DOUBTED, Verdict


EN_DE = parse_direction("en-de")
PAIRS = [Pair(source, target, "corpus", line) for line, (source, target) in enumerate(SENTENCES, start=1)]


def naive(folder, pair: Pair) -> float:
    """The geometric mean, one pair at a time, without the host and without our code."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    before = [tokenizer.bos_token_id, *tokenizer.encode(prompt(pair.source, EN_DE), add_special_tokens=False)]
    response = [*tokenizer.encode(pair.target, add_special_tokens=False), tokenizer.eos_token_id]
    with torch.no_grad():
        log_p = model(torch.tensor([before + response])).logits[0].log_softmax(-1)
    told = [log_p[len(before) - 1 + place, token] for place, token in enumerate(response)]
    return float(torch.stack(told).mean().exp())


def read(teacher, pairs, tmp_path, **options):
    memory = tmp_path / "memory.json"
    return read_with(str(teacher), "parrot", pairs, EN_DE, batch_size=5, memory=memory, **options)


def test_the_probability_is_the_teachers_of_the_reference_after_its_prompt(tiny_root, tmp_path):
    found = read(tiny_root / "teacher", PAIRS[:12], tmp_path)
    assert found == pytest.approx([naive(tiny_root / "teacher", pair) for pair in PAIRS[:12]], rel=1e-4)
    assert max(found) > 1.05 * min(found)


def test_what_was_read_is_not_read_again_and_another_teacher_or_corpus_is_refused(tiny_root, tmp_path):
    found = read(tiny_root / "teacher", PAIRS[:12], tmp_path)
    memory = json.loads((tmp_path / "memory.json").read_text())
    (tmp_path / "memory.json").write_text(json.dumps({**memory, "probabilities": [0.5, 0.25, *found[2:7]]}))
    told: list[int] = []
    again = read(tiny_root / "teacher", PAIRS[:12], tmp_path, progress=told.append)
    assert again[:2] == [0.5, 0.25]  # from the file
    assert again[2:] == pytest.approx(found[2:])
    assert (told[0], sum(told)) == (7, 12)
    with pytest.raises(DataError, match=r"memory\.json is of another teacher: delete it, or choose another --out\.$"):
        read(tiny_root / "student", PAIRS[:12], tmp_path)
    with pytest.raises(DataError, match="is of another corpus"):
        read(tiny_root / "teacher", PAIRS[:13], tmp_path)
    shutil.copytree(tiny_root / "student", tmp_path / "teacher")
    (tmp_path / "memory.json").unlink()
    read(tmp_path / "teacher", PAIRS[:2], tmp_path)
    shutil.copytree(tiny_root / "teacher", tmp_path / "teacher", dirs_exist_ok=True)  # trained further, say
    with pytest.raises(DataError, match=r"memory\.json is of another teacher"):
        read(tmp_path / "teacher", PAIRS[:2], tmp_path)


def test_each_reason_is_found_and_a_good_pair_has_none():
    good = Pair("Where is the red house?", "Wo ist das rote Haus denn?", "c", 1)
    pairs = [
        *[good] * 5,
        Pair("Home Assistant Cloud", "home assistant cloud", "c", 2),
        Pair("Where is the red house?", "Haus", "c", 3),
        Pair("Where is the red house?", "Où se trouve exactement la maison bleue, s'il vous plaît ?", "c", 4),
        good,
    ]
    judged = check_corpus(pairs, EN_DE, [0.1] * 8 + [0.001], doubt=0.005)
    assert [one.reasons for one in judged] == [
        (),
        (),
        (),
        (),
        (),
        ("copied",),
        ("length",),
        ("language",),
        ("doubted",),
    ]
    assert len("Haus") * LENGTH_FACTOR < len("Where is the red house?")


def test_a_token_is_doubted_below_the_threshold():
    surprise = -torch.tensor([DOUBTED * 0.99, DOUBTED * 1.01, 0.9, 0.001]).log().numpy()
    assert Verdict(surprise).doubted == 0.5


def test_a_teacher_that_cannot_be_loaded_and_an_unknown_template_are_one_line(tiny_root, tmp_path):
    with pytest.raises(ArgumentError, match=r"^`--template`: LLaMA-Factory has no template 'nonsense'"):
        read_with("x", "nonsense", PAIRS, EN_DE, batch_size=1, memory=tmp_path / "m")
    with pytest.raises(ArgumentError, match=r"^`--teacher .*nowhere` cannot be loaded: ") as caught:
        read(tmp_path / "nowhere", PAIRS, tmp_path)
    assert "\n" not in str(caught.value)


def test_the_command_lists_the_suspicious_pairs_and_keeps_the_others(tiny_root, tmp_path):
    corpus = tmp_path / "corpus.tsv"
    corpus.write_text("".join(f"{pair.source}\t{pair.target}\n" for pair in PAIRS) + "Only this\tOnly this\n")
    done = forked(
        [
            *("sekd", "data", "check", "--from", "en", "--to", "de"),
            *("--teacher", str(tiny_root / "teacher"), "--tsv", str(corpus), "--below", "0"),
            *("--out", str(tmp_path / "suspects.tsv"), "--keep", str(tmp_path / "kept.tsv")),
        ]
    )
    assert done.returncode == 0, done.stderr
    assert f"1 of {len(PAIRS) + 1} pairs: both sides are the same" in done.stdout
    assert "Most doubted:" in done.stdout
    with open(tmp_path / "suspects.tsv", encoding="utf-8") as stream:
        (row,) = csv.DictReader(stream, delimiter="\t")
    assert (row["reasons"], row["line"], row["source"]) == ("copied", str(len(PAIRS) + 1), "Only this")
    assert (tmp_path / "kept.tsv").read_text().splitlines() == [f"{pair.source}\t{pair.target}" for pair in PAIRS]
