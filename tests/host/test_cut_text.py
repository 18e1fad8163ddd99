"""What `cutoff_len` takes from the examples is counted as the host cuts, and said before anything is trained."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext

import pytest
from helpers.forks import forked
from helpers.runs import CLI, base_config, train, write_yaml

from llamafactory_sekd.errors import DataError
from llamafactory_sekd.host.tokenizing import counting_cut_text


SEKD = ["sekd"]
PROMPT, RESPONSE = " house dog tree" * 30, " Haus Hund Baum" * 30


@pytest.fixture(scope="module")
def long_root(tiny_root, tmp_path_factory):
    """The tiny models with examples of all lengths, half of them of several turns."""
    import shutil

    root = tmp_path_factory.mktemp("long")
    shutil.copytree(tiny_root, root, dirs_exist_ok=True)
    draw = random.Random(0)

    def words(text, most):
        return " ".join(text.split()[: draw.randint(1, most)])

    records = []
    for number in range(60):
        record = {"instruction": words(PROMPT, 60), "input": "", "output": words(RESPONSE, 60)}
        if number % 2:
            record["history"] = [[words(PROMPT, 20), words(RESPONSE, 20)] for _ in range(2)]
        records.append(record)
    (root / "data" / "long.json").write_text(json.dumps(records), encoding="utf-8")
    info = json.loads((root / "data" / "dataset_info.json").read_text())
    info["long"] = {
        "file_name": "long.json",
        "columns": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    }
    (root / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return root


def tokenize(root, cutoff_len, lines, max_cut=1.0, **keys):
    """Return the host's rows, with our counting in effect."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    config = base_config(root, output_dir="unused", dataset="long", cutoff_len=cutoff_len, **keys)
    model_args, data_args, training_args, _, _ = get_train_args(config)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    with counting_cut_text(max_cut, lines.append) if lines is not None else nullcontext():
        rows = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"]
    return rows, module


@pytest.mark.parametrize("template", ["parrot", "qwen", "llama2"])
@pytest.mark.parametrize("keys", [{}, {"mask_history": True}, {"packing": True}], ids=["turns", "history", "packed"])
def test_the_counts_are_those_of_the_rows_with_and_without_a_limit(long_root, template, keys):
    uncut, _ = tokenize(long_root, 8000, None, template=template, mask_history=keys.get("mask_history", False))
    limit = 150
    lines = []
    rows, _ = tokenize(long_root, limit, lines, template=template, **keys)
    assert rows.column_names == tokenize(long_root, limit, None, template=template, **keys)[0].column_names
    lengths = [len(row) for row in uncut["input_ids"]]
    room = limit - bool(keys.get("packing"))
    over = sum(length > room for length in lengths)
    (line,) = lines
    assert f"60 examples for training, the longest of {max(lengths)} tokens: {over} exceed" in line
    if keys.get("packing"):
        return

    def learned(labels):
        return [label for label in labels if label != -100]

    responses = sum(
        learned(cut) != learned(complete) for cut, complete in zip(rows["labels"], uncut["labels"], strict=True)
    )
    prompts = sum(
        len(cut) - len(learned(cut)) < len(complete) - len(learned(complete))
        for cut, complete in zip(rows["labels"], uncut["labels"], strict=True)
    )
    if keys.get("mask_history"):  # the labels hide the responses of the history, so its prompts cannot be told apart
        assert f"{responses} the end of the response" in line
        return
    assert f"{prompts} lose the end of the prompt" in line
    assert f"{responses} the end of the response" in line
    assert prompts
    assert responses


def test_responses_without_text_are_counted_and_refused_where_there_is_nothing_else(tiny_root, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    records = json.loads((tiny_root / "data" / "tiny.json").read_text())
    sets = {"half": [dict(r, output=" \n" * (n % 2) or r["output"]) for n, r in enumerate(records)]}
    sets["none"] = [dict(r, output="") for r in records]
    for name, kept in sets.items():
        (data / f"{name}.json").write_text(json.dumps(kept), encoding="utf-8")
    info = {name: {"file_name": f"{name}.json"} for name in sets}
    (data / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), dataset_dir=str(data), max_steps=1)
    train({**config, "dataset": "half"})
    assert f"{len(records) // 2} have a response without text." in capsys.readouterr().out
    with pytest.raises(DataError, match=f"None of the {len(records)} examples has text in its response"):
        train({**config, "dataset": "none"})


def test_several_workers_and_a_second_run_from_the_hosts_cache_count_alike(long_root):
    first, second, third = [], [], []
    tokenize(long_root, 120, first)
    tokenize(long_root, 120, second, preprocessing_num_workers=2, overwrite_cache=False)
    tokenize(long_root, 120, third, preprocessing_num_workers=2, overwrite_cache=False)
    assert first == second == third


def test_a_run_with_most_examples_cut_is_refused_before_it_starts_unless_a_key_says_so(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), cutoff_len=40, max_steps=1)
    refused = forked([CLI, "train", str(write_yaml(tmp_path / "x.yaml", config))], cwd=tmp_path)
    assert refused.returncode != 0
    assert "32 examples for training" in refused.stdout
    assert "`cutoff_len: 40` cuts 32 of 32 examples" in refused.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert train({**config, "kd_max_cut": 1}).joinpath("model.safetensors").exists()


def test_the_start_of_a_stream_is_counted_as_the_data_set_is_and_what_is_too_much_there_is_refused(long_root):
    streaming = {"streaming": True, "max_steps": 1, "dataloader_num_workers": 1}
    for keys in ({}, {"packing": True}, {"mask_history": True}):
        counted, start = [], []
        tokenize(long_root, 120, counted, **keys)
        tokenize(long_root, 120, start, **keys, **streaming)
        (line,) = start
        assert line.startswith("`streaming: true`, of which the first 1,000 at most are counted: 60 examples")
        assert line.endswith(counted[0])
    with pytest.raises(DataError, match=r"`cutoff_len: 40` cuts \d+ of 60 examples"):
        tokenize(long_root, 40, [], max_cut=0.5, **streaming)


def test_doctor_and_cache_say_it_too(tiny_root, tmp_path):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), cutoff_len=66)
    path = str(write_yaml(tmp_path / "x.yaml", config))
    keys = ["kd_max_cut=1"]
    doctor = forked([*SEKD, "doctor", path, *keys, "--devices", "1"], cwd=tmp_path)
    cache = forked([*SEKD, "cache", path, *keys, "--out", str(tmp_path / "cache")], cwd=tmp_path)
    assert doctor.returncode == cache.returncode == 0, doctor.stderr + cache.stderr
    (line,) = (line for line in doctor.stdout.splitlines() if line.startswith("Data: "))
    assert "exceed `cutoff_len: 66`" in line
    assert line.removeprefix("Data: ") in cache.stdout
    for program in (["doctor", path], ["cache", path, "--out", str(tmp_path / "other")]):
        refused = forked([*SEKD, *program], cwd=tmp_path)
        assert refused.returncode != 0
        assert "kd_max_cut: 0.5" in refused.stderr
